"""`millpond learn`: data, training, evaluation, export, and the job that the hub starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from millpond.cli.mlperf import mlperf, mlperf_run
from millpond.settings import LearnSettings, load

if TYPE_CHECKING:
    from millpond.learn.datasets import Dataset
    from millpond.learn.evaluate import Evaluation
    from millpond.learn.inspect import Inspection
    from millpond.learn.run import Run
    from millpond.schema import JobProgress

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

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


@app.command()
def data(
    name: Annotated[str | None, typer.Argument(help="A corpus to fetch; without it, all are listed.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="Take the corpus from this directory.")] = None,
    file: DataFile = None,
    test_file: TestFile = None,
    text: TextColumn = "text",
    label: LabelColumn = "label",
    split: SplitColumn = None,
    query: Query = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """List the named corpora, fetch one (resumed where it was cut), or check a file as training would read it."""
    from millpond.learn import corpora

    if file is not None or query is not None:
        named = _data_changes(None, file, test_file, text, label, split, query, database)
        _show_dataset(_load(named), as_json)
    elif name is None:
        _list_corpora(as_json)
    elif source is not None:
        _show_dataset(corpora.prepare(name, source, _settings()), as_json)
    else:
        with _fetching(name) as on_bytes:
            _show_dataset(corpora.load(name, _settings(), on_bytes=on_bytes), as_json)


@app.command()
def inspect(
    source: Annotated[
        str, typer.Argument(help="A corpus, a file or directory (path or URL), or with --query a database.")
    ],
    test_file: TestFile = None,
    text: TextColumn = "text",
    label: LabelColumn = "label",
    split: SplitColumn = None,
    query: Query = None,
    drop_leaks: DropLeaks = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out near-duplicates and label errors.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the page with pictures and rows to look at here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Look at data before training on it: balance, lengths, languages, repeats, leaks, likely label errors."""
    from millpond.learn import corpora
    from millpond.learn.inspect import inspect as look_at

    corpus, database = (source, None) if source in corpora.CORPORA else (None, source if query else None)
    file = None if corpus or database else source
    dataset = _load(_data_changes(corpus, file, test_file, text, label, split, query, database, drop_leaks))
    with _Counting() as on_progress:
        inspection = look_at(dataset, quick=quick, on_progress=on_progress)
    if html is not None:
        from millpond.learn.inspection_page import write_page

        write_page(inspection, html)
    if as_json:
        from msgspec import to_builtins

        typer.echo(json.dumps(to_builtins(inspection), indent=2))
        return
    _show_inspection(inspection)
    _show_bad_rows(dataset)
    if html is not None:
        _console().print(f"Page: {html}")


@app.command()
def train(
    recipe_file: RecipeFile = None,
    corpus: CorpusName = None,
    file: DataFile = None,
    test_file: TestFile = None,
    text: TextColumn = "text",
    label: LabelColumn = "label",
    split: SplitColumn = None,
    query: Query = None,
    database: Database = None,
    drop_leaks: DropLeaks = False,
    model: Annotated[str | None, typer.Option(help="ngram (default), seqcnn, lstm or encoder.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="An option of the model, name=value; repeatable.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Times through the training rows.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Texts a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Step size of Adam, at its highest.")] = None,
    schedule: Annotated[str | None, typer.Option(help="How it falls: constant (default), linear or cosine.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps in which it rises from 0.")] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Longest gradient; 0: any.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 (default), bfloat16 or float16.")] = None,
    by_length: Annotated[
        bool | None, typer.Option("--by-length/--no-by-length", help="Texts of like length share a batch.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many epochs that are no better; 0: never.")
    ] = None,
    framework: Annotated[
        str | None, typer.Option(help="What computes the steps: torch (default), or paddle for seqcnn and lstm.")
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Send the step through torch.compile; default: on a pool's GPU only."
        ),
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="A run or model whose answers are learned too.")] = None,
    unlabelled: Annotated[Path | None, typer.Option(help="A file of texts that the teacher answers.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of splits, order and first weights.")] = None,
    train_rows: Annotated[int | None, typer.Option(help="Use this many training rows only.")] = None,
    validation: Annotated[float | None, typer.Option(help="Share held back to choose the best epoch.")] = None,
    device: Device = "auto",
    gpus: Annotated[
        int, typer.Option(min=1, max=64, help="Share each batch among so many GPUs; with --device cpu, processes.")
    ] = 1,
    out: Annotated[Path | None, typer.Option(help="Directory of the run; default: runs/ under the home.")] = None,
    name: Annotated[str, typer.Option(help="Name that the model carries.")] = "sentiment",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, or the newest, that did not end.")
    ] = False,
    mlflow: Annotated[
        bool, typer.Option("--mlflow", help="Track it in MLflow: MLFLOW_TRACKING_URI, or mlflow/ under the home.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model, measure it on the test split once, write model, metrics and report into a run directory."""
    from millpond.learn.recipes import read_recipe
    from millpond.learn.run import run
    from millpond.learn.tracking import tracker

    taught = {"teacher": teacher, "unlabelled": unlabelled}
    changes = {
        "data": _data_changes(corpus, file, test_file, text, label, split, query, database, drop_leaks),
        "model": {"architecture": model, "options": dict(map(_option, option or []))},
        "training": {
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "schedule": schedule,
            "warmup": warmup,
            "clip_norm": clip_norm,
            "precision": precision,
            "by_length": by_length,
            "patience": patience,
            "framework": framework,
            "compile": compile_,
        },
        "distil": {name: str(path) for name, path in taught.items() if path} or None,
        "seed": seed,
        "train_rows": train_rows,
        "validation": validation,
    }
    recipe = read_recipe(recipe_file, changes)
    settings = _settings()
    tracking = tracker(mlflow, settings.home, lambda warning: typer.echo(f"warning: {warning}", err=True))
    with _Bar() as report:
        done = run(
            recipe,
            settings,
            device=device,
            name=name,
            out=out,
            report=report,
            resume=resume,
            tracker=tracking,
            workers=gpus,
        )
    if as_json:
        typer.echo(json.dumps(done.summary(), indent=2))
    else:
        _show_bad_rows(done.dataset)
        _show_evaluation(done.evaluation, done.dataset)
        _show_run(done)
        if tracking is not None and tracking.is_on:
            _console().print(f"MLflow: run {tracking.run_id} at {tracking.uri}")
    if done.trained.training.ended == "diverged":
        best = done.trained.training.best
        typer.echo(f"error: {done.trained.training.error} The model is that of epoch {best}.", err=True)
        raise typer.Exit(1)


@app.command()
def evaluate(
    model_dir: Annotated[Path, typer.Argument(help="A model directory, or a run that holds one.")],
    recipe_file: RecipeFile = None,
    corpus: CorpusName = None,
    file: DataFile = None,
    test_file: TestFile = None,
    text: TextColumn = "text",
    label: LabelColumn = "label",
    split: SplitColumn = None,
    query: Query = None,
    database: Database = None,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Directory for picture, metrics and worst mistakes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on the test split of a corpus or file."""
    from millpond.learn.recipes import read_recipe
    from millpond.learn.run import measure

    changes = _data_changes(corpus, file, test_file, text, label, split, query, database)
    recipe = read_recipe(recipe_file, {"data": changes})
    directory = model_dir / "model" if (model_dir / "model").is_dir() else model_dir
    dataset, evaluation = measure(directory, recipe, _settings(), device=device, out=out)
    if as_json:
        from msgspec import to_builtins

        typer.echo(json.dumps(to_builtins(evaluation), indent=2))
        return
    _show_bad_rows(dataset)
    _show_evaluation(evaluation, dataset)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="A run (or model directory) to sign and push.")],
    name: Annotated[str | None, typer.Option(help="Name in the registry; default: the one it has.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag to give it, such as candidate; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Give a trained model its version, sign it, push it into the registry."""
    from millpond.learn.publish import publish
    from millpond.settings import RegistrySettings, load

    directory = run_dir / "model" if (run_dir / "model").is_dir() else run_dir
    pushed = publish(directory, load(RegistrySettings), name=name, tags=tag or [])
    if as_json:
        typer.echo(json.dumps({"name": pushed.name, "version": pushed.version, "digest": pushed.digest}))
        return
    _console().print(f"{pushed.name} {pushed.version} {pushed.digest}")


@app.command()
def job(
    directory: Annotated[Path, typer.Argument(help="The job's directory: job.json and what it names.")],
    device: Device = "auto",
) -> None:
    """Do a training job as the hub asks for: train with its corrections, compare, sign, push, write result.json."""
    from millpond.process import die_with_parent

    die_with_parent()
    from millpond.learn.job import do_job

    with _Bar() as report:
        result = do_job(directory, _settings(), device=device, on_progress=report)
    typer.echo(f"{result.version} {result.digest}: test accuracy {result.test.candidate_accuracy:.4f}")


app.command()(mlperf)
app.command("mlperf-run", hidden=True)(mlperf_run)


# --- what is shown -----------------------------------------------------------------------------------------------


def _settings() -> LearnSettings:
    return load(LearnSettings)


def _console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False)


def _data_changes(
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
    return changes | {"file": _absolute(file), "test_file": _absolute(test_file)}


def _absolute(source: str | None) -> str | None:
    from millpond.learn.sources import is_url

    return str(Path(source).expanduser().resolve()) if source and not is_url(source) else source


def _load(data_changes: dict[str, str | bool | None]) -> Dataset:
    from millpond.learn.recipes import load_data, read_recipe

    recipe = read_recipe(None, {"data": data_changes})
    with _console(stderr=True).status(f"reading {recipe.data.source}") as status:
        return load_data(
            recipe,
            _settings(),
            on_rows=lambda count: status.update(f"reading {recipe.data.source}: {count:,} rows"),
        )


def _option(given: str) -> tuple[str, int | float | str]:
    """Read `name=value`; a number is a number."""
    name, equals, value = given.partition("=")
    if not equals:
        raise typer.BadParameter(f"{given!r} is not name=value", param_hint="--option")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


class _Bar:
    """Shows a run on stderr: on a terminal as a bar with stage, loss, accuracy and rate, elsewhere as lines."""

    def __enter__(self) -> Callable[[JobProgress], None]:
        shown = progress.TextColumn("{task.description:<9}"), progress.BarColumn()
        last = progress.TextColumn("{task.fields[shown]}")
        console = _console(stderr=True)
        self._bar = progress.Progress(*shown, last, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("data", total=None, shown="")
        self._last_line = ""
        self._bar.start()
        return self._report

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def hide(self) -> None:
        """Make room on the terminal for something else, until `show`."""
        self._bar.stop()

    def show(self) -> None:
        """Be seen again."""
        self._bar.start()

    def _report(self, at: JobProgress) -> None:
        shown = at.note if at.loss is None else f"loss {at.loss:.4f}  accuracy {at.accuracy or 0:.2%}  {at.note}"
        if not self._bar.disable:
            self._bar.update(self._task, description=at.stage, total=at.total or None, completed=at.done, shown=shown)
        elif (line := at.note.partition(",")[0]) != self._last_line or at.done == at.total:
            # Once at the beginning of each epoch or stage, and at the end of training.
            self._last_line = line
            typer.echo(f"{at.stage:<9} {shown}", err=True)


@contextmanager
def _fetching(name: str) -> Iterator[Callable[[int], None]]:
    from millpond.learn import corpora

    total = corpora.CORPORA[name].fetched_bytes if name in corpora.CORPORA else None
    shown = progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn()
    rate = progress.TransferSpeedColumn(), progress.TimeRemainingColumn()
    with progress.Progress(*shown, *rate, console=_console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"fetching {name}", total=total)
        yield lambda count: bar.update(task, completed=count)


def _list_corpora(as_json: bool) -> None:
    from millpond.learn import corpora

    settings = _settings()
    places = {name: corpora.place(name, settings) for name in corpora.CORPORA}
    if as_json:
        rows = [
            {
                "name": corpus.name,
                "summary": corpus.summary,
                "licence": corpus.licence,
                "official_test": corpus.official_test,
                "fetched_bytes": corpus.fetched_bytes,
                "place": str(places[corpus.name]) if places[corpus.name] else None,
            }
            for corpus in corpora.CORPORA.values()
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("corpus", "what it is", "on this machine")
    for corpus in corpora.CORPORA.values():
        fetch = f"no; fetch it ({corpus.fetched_bytes / 1e6:.0f} MB):\nmillpond learn data {corpus.name}"
        table.add_row(corpus.name, f"{corpus.summary}\n({corpus.licence})", str(places[corpus.name] or fetch))
    _console().print(table)


def _show_dataset(dataset: Dataset, as_json: bool) -> None:
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    counts = {
        name: {label: int((split.labels == i).sum()) for i, label in enumerate(dataset.labels)}
        for name, split in splits.items()
        if split is not None
    }
    if as_json:
        shown = {"name": dataset.name, "digest": dataset.digest, "source": dataset.source, "rows": counts}
        bad = [{"where": where, "why": why} for where, why in dataset.bad_rows.first]
        official = {"official_test": dataset.official_test}
        typer.echo(json.dumps(shown | official | {"bad_rows": dataset.bad_rows.count, "first_bad_rows": bad}, indent=2))
        return
    table = Table("split", "rows", "labels")
    for name, by_label in counts.items():
        shares = ", ".join(f"{label} {count:,}" for label, count in list(by_label.items())[:10])
        table.add_row(name, f"{sum(by_label.values()):,}", shares + (", …" if len(by_label) > 10 else ""))
    _console().print(table, f"{dataset.name} {dataset.digest}\nfrom {dataset.source}", sep="\n")
    _show_bad_rows(dataset)


class _Counting:
    """Shows on stderr what an inspection looks at, how far it is, and what is left."""

    def __enter__(self) -> Callable[[str, int, int], None]:
        console = _console(stderr=True)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description:<16}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("texts", total=None)
        self._what = ""
        self._bar.start()
        return self._report

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def _report(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._what = what
            self._bar.reset(self._task, description=what, total=total)
            if self._bar.disable:
                typer.echo(f"looking at {what}", err=True)
        self._bar.update(self._task, completed=done)


def _show_inspection(it: Inspection) -> None:
    console = _console()
    table = Table("split", "rows", "labels", "words: 5 %, median, 95 %, most", "repeated")
    for name, figures in it.splits.items():
        largest = sorted(figures.labels.items(), key=lambda pair: -pair[1])
        shares = ", ".join(f"{escape(label)} {count / max(1, figures.rows):.1%}" for label, count in largest[:8])
        words = figures.words
        lengths = f"{words.p05:,}  {words.median:,}  {words.p95:,}  {words.most:,}"
        more = f", … {len(largest):,} labels" if len(largest) > 8 else ""
        table.add_row(name, f"{figures.rows:,}", shares + more, lengths, f"{figures.repeated:,}")
    console.print(table, f"{it.name} {it.digest}\nfrom {it.source}", sep="\n", soft_wrap=True)
    found = Table("what", "how many", show_header=False)
    for leak in it.leaks:
        found.add_row(f"texts of {leak.split} that are in {leak.of} too", f"{leak.texts:,} ({leak.rows:,} rows)")
    found.add_row("texts with different labels in different rows", f"{it.conflicting:,}")
    for trait, count in it.traits.items():
        found.add_row(f"texts: {trait}", f"{count:,}")
    if it.languages is not None:
        told = sum(it.languages.values())
        shares = ", ".join(f"{language} {count / told:.1%}" for language, count in list(it.languages.items())[:6])
        found.add_row(f"languages of {told:,} texts", shares)
    if it.near_duplicates is not None:
        near = it.near_duplicates
        groups = f"{near.texts:,} in {near.groups:,} groups; {near.across:,} of test near one of train"
        found.add_row(f"near-duplicates among {near.compared:,} texts", groups)
    if it.label_errors is not None:
        found.add_row(f"labels likely wrong among {it.label_errors.rows:,} rows", f"{it.label_errors.likely:,}")
    console.print(found)
    if it.label_errors is not None and it.label_errors.examples:
        suspects = Table("train row", "label", "likely", "text", title="Labels to look at first", title_justify="left")
        for error in it.label_errors.examples[:5]:
            shown = escape(" ".join(_printable(error.example.text).split())[:160])
            row = f"{error.example.row:,}"
            suspects.add_row(
                row, escape(error.example.label), f"{escape(error.suggested)} {error.probability:.1%}", shown
            )
        console.print(suspects)


def _printable(text: str) -> str:
    """Return a text without what would move a terminal's cursor or turn its direction."""
    return "".join(character if character.isprintable() else " " for character in text)


def _show_bad_rows(dataset: Dataset) -> None:
    if dataset.bad_rows.count:
        _console().print(f"Bad rows that were not used, {dataset.bad_rows.count:,}:\n{dataset.bad_rows}", markup=False)


def _show_run(done: Run) -> None:
    training = done.trained.training
    if training.interrupted:
        of = f"epoch {training.best}" if training.best else "the unfinished epoch"
        _console().print(f"Interrupted: the model is that of {of}. With --resume it goes on.")
    if training.ended == "early":
        _console().print(f"Stopped after epoch {len(training.epochs)}: epoch {training.best} was better, and is kept.")
    if training.resumed:
        _console().print(f"Resumed in epoch {training.resumed[0]} after step {training.resumed[1]}.")
    if padding := [epoch.padding for epoch in training.epochs if epoch.padding]:
        share = sum(padding) / len(padding)
        hint = "" if done.trained.how.by_length else "; --by-length makes it less"
        _console().print(f"{share:.1%} of what the steps computed on was padding{hint}.")
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in done.watch.seconds.items())
    _console().print(f"{stages}\nRun: {done.directory}\nReport: {done.directory / 'report.html'}")


def _show_evaluation(evaluation: Evaluation, dataset: Dataset) -> None:
    table = Table("label", "rows", "precision", "recall", "F1")
    for score in evaluation.classes[:50]:
        numbers = (f"{value:.4f}" for value in (score.precision, score.recall, score.f1))
        table.add_row(score.label, f"{score.rows:,}", *numbers)
    split = "official test split" if dataset.official_test else "test split"
    _console().print(table)
    if len(evaluation.by_source) > 1:
        table = Table("source", "rows", "accuracy")
        for source in evaluation.by_source:
            table.add_row(escape(source.name), f"{source.rows:,}", f"{source.accuracy:.2%}")
        _console().print(table)
    _console().print(
        f"{dataset.name}, {split}, {evaluation.rows:,} texts: accuracy {evaluation.accuracy:.2%}, "
        f"macro F1 {evaluation.macro_f1:.4f}, log loss {evaluation.log_loss:.4f}, "
        f"calibration error {evaluation.calibration_error:.4f}"
    )


from millpond.cli import tune as _tune  # noqa: E402, F401  (it adds its command to `app`)
