"""`millpond learn mlperf`: time to 90.6 % on the sentiment benchmark, by the rules of MLPerf Training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from millpond.cli.training_options import (
    AsJson,
    BatchSize,
    Compile,
    CorpusName,
    LearningRate,
    ModelOptions,
    Precision,
    absolute,
    model_options,
)
from millpond.cli.training_output import Bar
from millpond.settings import LearnSettings, load

if TYPE_CHECKING:
    from millpond.learn.mllog import RunLog
    from millpond.learn.submission import Place, Record


def mlperf(
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs, with the seeds 0, 1, …")] = 5,
    division: Annotated[
        Literal["closed", "open"],
        typer.Option(help="closed: the reference's model and method; open: any model."),
    ] = "closed",
    model: Annotated[
        list[str] | None, typer.Option(help="Of the open division; repeatable. Default: ngram, seqcnn and lstm.")
    ] = None,
    option: ModelOptions = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs after which a run gives up.")] = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    precision: Precision = None,
    compile_: Compile = None,
    corpus: CorpusName = "imdb",
    file: Annotated[str | None, typer.Option("--file", help="A file in its place; open division only.")] = None,
    device: Annotated[str, typer.Option(help="Of the local runs: auto, cpu, cuda …")] = "auto",
    pool: Annotated[
        bool, typer.Option("--pool", help="Make each run once more under a lease of the pool, and give the ratio.")
    ] = False,
    rehearse: Annotated[
        int | None, typer.Option(min=16, help="Use so many rows of each split, one epoch: no result, but rates.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the runs; default: mlperf/ under the home.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the runs in --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the time to 90.6 % of IMDB's test split, over several seeds, as MLPerf Training's rules have it."""
    import datetime

    from millpond.learn.mlperf import plan
    from millpond.learn.recipes import load_data
    from millpond.learn.submission import SubmissionError, make_runs, open_submission

    settings = load(LearnSettings)
    if resume and out is None:
        raise SubmissionError("--resume needs --out: the directory of the runs to go on with.")
    training = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "precision": precision,
        "compile": compile_,
    }
    planned = plan(
        division,
        {"file": absolute(file)} if file else {"corpus": corpus},
        models=model or [],
        options=model_options(option),
        training=training,
        device=device,
        rehearsal=rehearse,
    )
    directory = out or settings.home / "mlperf" / f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{division}"
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status("reading the data"):  # brought into a prepared set once, before any clock runs
        load_data(next(iter(planned.recipes.values())), settings)
    open_submission(directory, planned, resume=resume)

    def on_run(of: str, place: Place, seed: int, log: RunLog | None) -> None:
        name = f"{of}, {place}, seed {seed}"
        console.print(f"{name}: running" if log is None else f"{name}: {_shown(log)}")

    made = make_runs(directory, planned, seeds, ("local", "pool") if pool else ("local",), on_run=on_run)
    if as_json:
        from msgspec import to_builtins

        typer.echo(json.dumps(to_builtins(made), indent=2))
    else:
        _show(made, directory)


def mlperf_run(
    directory: Annotated[Path, typer.Argument(help="A submission's directory.")],
    model: Annotated[str, typer.Argument(help="A model of its plan.")],
    seed: Annotated[int, typer.Argument(min=0)],
    place: Annotated[Literal["local", "pool"], typer.Option(help="Where this process runs.")] = "local",
) -> None:
    """Make one run of a submission, in this process."""
    from millpond.learn.submission import make_run

    with Bar() as report:
        make_run(directory, model, seed, place, load(LearnSettings), report)


def _shown(log: RunLog) -> str:
    best = max((epoch.accuracy for epoch in log.epochs), default=0.0)
    if log.status == "success":
        return f"{log.seconds:.1f} s, epoch {len(log.epochs)}, {best:.2%}"
    return f"aborted after {log.seconds:.1f} s: {log.why} (best {best:.2%})"


def _show(record: Record, directory: Path) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    title = f"{record.benchmark}, {record.division} division: time to more than {record.target:.1%} of the test split"
    table = Table("model", "place", "result", "runs", "epochs", "a step", "an epoch", title=title, title_justify="left")
    for entry in record.entries:
        runs = ", ".join(
            f"{made.run.seconds:.1f}" if made.run.status == "success" else "aborted" for made in entry.runs
        )
        table.add_row(
            entry.model,
            entry.place,
            f"{entry.result_s:.1f} s" if entry.result_s is not None else f"none: {entry.why_none}",
            runs,
            f"{entry.epochs:.1f}" if entry.epochs else "",
            f"{entry.step_s * 1000:,.0f} ms" if entry.step_s else "",
            f"{entry.full_epoch_s:,.0f} s" if entry.full_epoch_s else "",
        )
    console.print(table)
    for model, ratio in record.pool_to_local.items():
        console.print(f"{model}: over the pool {ratio:.3f} times the local result.")
    if any(entry.result_s is not None for entry in record.entries):
        console.print(
            "The result is the mean of the runs without the fastest and the slowest. Unverified by MLCommons."
        )
    console.print("The test split was read after each epoch, by the reference's rule: never tune on this.")
    console.print(f"Logs, record.json and accuracy.png: {directory}", soft_wrap=True)
