"""Options that several commands share: which data, which model, how it learns. Each is written once, and read here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Machine output.")]
CorpusName = Annotated[str | None, typer.Option("--corpus", help="A named corpus; see `millpond learn data`.")]
DataFile = Annotated[
    str | None,
    typer.Option(
        "--file", help="CSV, TSV, JSONL or Parquet files, or a directory per class; a path, a pattern or a URL."
    ),
]
TestFile = Annotated[str | None, typer.Option(help="Other files or another directory to test on.")]
Query = Annotated[str | None, typer.Option("--query", help="A SELECT whose rows are the data.")]
Database = Annotated[
    str | None,
    typer.Option("--database", help="SQLAlchemy URL for --query; without it, MILLPOND_LEARN_DATABASE."),
]
DropLeaks = Annotated[
    bool, typer.Option("--drop-leaks", help="Leave out training rows whose text is in the test split.")
]
TextColumn = Annotated[str, typer.Option("--text", help="Column with the text.")]
LabelColumn = Annotated[str, typer.Option("--label", help="Column with the label.")]
SplitColumn = Annotated[str | None, typer.Option("--split", help="Column that says train, validation or test.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A recipe (TOML); other options change it.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, pool:0 …; auto: the accelerator if there is one.")]
ModelName = Annotated[str | None, typer.Option("--model", help="ngram (default), seqcnn, lstm or encoder.")]
ModelOptions = Annotated[
    list[str] | None, typer.Option("--option", help="An option of the model, name=value; repeatable.")
]
BatchSize = Annotated[int | None, typer.Option(help="Texts a step.")]
LearningRate = Annotated[float | None, typer.Option(help="Step size of Adam, at its highest.")]
Precision = Annotated[str | None, typer.Option(help="float32 (default), bfloat16 or float16.")]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Send the step through torch.compile; default: on a pool's GPU only."),
]
TrainRows = Annotated[int | None, typer.Option(help="Use this many training rows only.")]


def data_changes(
    corpus: str | None,
    file: str | None,
    test_file: str | None,
    text: str,
    label: str,
    split: str | None,
    query: str | None,
    database: str | None,
    drop_leaks: bool = False,
) -> dict[str, str | bool | None]:
    """Return what the options change of a recipe's [data]; columns only count where a file or query is named."""
    changes: dict[str, str | bool | None] = {"corpus": corpus, "drop_leaks": drop_leaks or None}
    if file is None and query is None:
        return changes
    changes |= {"text": text, "label": label, "split": split, "query": query, "database": database}
    return changes | {"file": absolute(file), "test_file": absolute(test_file)}


def absolute(source: str | None) -> str | None:
    """Return a path from the root, a URL as it is."""
    from millpond.learn.sources import is_url

    return str(Path(source).expanduser().resolve()) if source and not is_url(source) else source


def model_options(given: list[str] | None) -> dict[str, int | float | str]:
    """Read `name=value`, each; a number is a number.

    Raises:
        typer.BadParameter: one is not of that form.
    """
    return dict(map(_model_option, given or []))


def _model_option(given: str) -> tuple[str, int | float | str]:
    name, equals, value = given.partition("=")
    if not equals:
        raise typer.BadParameter(f"{given!r} is not name=value", param_hint="--option")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
