"""`millpond learn`: data, training, evaluation, export, and the job that the hub starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from millpond.cli.mlperf import mlperf, mlperf_run
from millpond.cli.training_options import (
    AsJson,
    BatchSize,
    Compile,
    CorpusName,
    Database,
    DataFile,
    Device,
    DropLeaks,
    LabelColumn,
    LearningRate,
    ModelName,
    ModelOptions,
    Precision,
    Query,
    RecipeFile,
    SplitColumn,
    TestFile,
    TextColumn,
    TrainRows,
    data_changes,
    model_options,
)
from millpond.cli.training_output import (
    Bar,
    Counting,
    console,
    fetching,
    list_corpora,
    show_bad_rows,
    show_dataset,
    show_evaluation,
    show_inspection,
    show_run,
)
from millpond.cli.tune import tune
from millpond.settings import LearnSettings, RegistrySettings, load

if TYPE_CHECKING:
    from collections.abc import Callable

    from millpond.learn.datasets import Dataset
    from millpond.learn.paddle.place import Hire
    from millpond.learn.recipes import Recipe
    from millpond.schema import JobProgress

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


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
        named = data_changes(None, file, test_file, text, label, split, query, database)
        show_dataset(_load(named), as_json)
    elif name is None:
        list_corpora(as_json)
    elif source is not None:
        show_dataset(corpora.prepare(name, source, load(LearnSettings)), as_json)
    else:
        with fetching(name) as on_bytes:
            show_dataset(corpora.load(name, load(LearnSettings), on_bytes=on_bytes), as_json)


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
    dataset = _load(data_changes(corpus, file, test_file, text, label, split, query, database, drop_leaks))
    with Counting() as on_progress:
        inspection = look_at(dataset, quick=quick, on_progress=on_progress)
    if html is not None:
        from millpond.learn.inspection_page import write_page

        write_page(inspection, html)
    if as_json:
        from msgspec import to_builtins

        typer.echo(json.dumps(to_builtins(inspection), indent=2))
        return
    show_inspection(inspection)
    show_bad_rows(dataset)
    if html is not None:
        console().print(f"Page: {html}")


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
    model: ModelName = None,
    option: ModelOptions = None,
    epochs: Annotated[int | None, typer.Option(help="Times through the training rows.")] = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    schedule: Annotated[str | None, typer.Option(help="How it falls: constant (default), linear or cosine.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps in which it rises from 0.")] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Longest gradient; 0: any.")] = None,
    precision: Precision = None,
    by_length: Annotated[
        bool | None, typer.Option("--by-length/--no-by-length", help="Texts of like length share a batch.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many epochs that are no better; 0: never.")
    ] = None,
    framework: Annotated[
        str | None, typer.Option(help="What computes the steps: torch (default), or paddle for seqcnn and lstm.")
    ] = None,
    compile_: Compile = None,
    teacher: Annotated[Path | None, typer.Option(help="A run or model whose answers are learned too.")] = None,
    unlabelled: Annotated[Path | None, typer.Option(help="A file of texts that the teacher answers.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of splits, order and first weights.")] = None,
    train_rows: TrainRows = None,
    validation: Annotated[float | None, typer.Option(help="Share held back to choose the best epoch.")] = None,
    device: Device = "auto",
    gpus: Annotated[
        int, typer.Option(min=1, max=64, help="Share each batch among so many GPUs; with --device cpu, processes.")
    ] = 1,
    lease: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="With --framework paddle: train on a device of the pool, `whole`, or a part of one such as 8GiB.",
        ),
    ] = None,
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
        "data": data_changes(corpus, file, test_file, text, label, split, query, database, drop_leaks),
        "model": {"architecture": model, "options": model_options(option)},
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
    settings = load(LearnSettings)
    elsewhere = _on_the_pool(lease, recipe, device) if lease else None
    tracking = tracker(mlflow, settings.home, lambda warning: typer.echo(f"warning: {warning}", err=True))
    with Bar() as report:
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
            elsewhere=elsewhere(report) if elsewhere else None,
        )
    if as_json:
        typer.echo(json.dumps(done.summary(), indent=2))
    else:
        show_bad_rows(done.dataset)
        show_evaluation(done.evaluation, done.dataset)
        show_run(done)
        if tracking is not None and tracking.is_on:
            console().print(f"MLflow: run {tracking.run_id} at {tracking.uri}")
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

    changes = data_changes(corpus, file, test_file, text, label, split, query, database)
    recipe = read_recipe(recipe_file, {"data": changes})
    directory = model_dir / "model" if (model_dir / "model").is_dir() else model_dir
    dataset, evaluation = measure(directory, recipe, load(LearnSettings), device=device, out=out)
    if as_json:
        from msgspec import to_builtins

        typer.echo(json.dumps(to_builtins(evaluation), indent=2))
        return
    show_bad_rows(dataset)
    show_evaluation(evaluation, dataset)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="A run (or model directory) to sign and push.")],
    name: Annotated[str | None, typer.Option(help="Name in the registry; default: the one it has.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A tag to give it, such as candidate; repeatable.")] = None,
    as_json: AsJson = False,
) -> None:
    """Give a trained model its version, sign it, push it into the registry."""
    from millpond.learn.publish import publish

    directory = run_dir / "model" if (run_dir / "model").is_dir() else run_dir
    pushed = publish(directory, load(RegistrySettings), name=name, tags=tag or [])
    if as_json:
        typer.echo(json.dumps({"name": pushed.name, "version": pushed.version, "digest": pushed.digest}))
        return
    console().print(f"{pushed.name} {pushed.version} {pushed.digest}")


@app.command()
def job(
    directory: Annotated[Path, typer.Argument(help="The job's directory: job.json and what it names.")],
    device: Device = "auto",
) -> None:
    """Do a training job as the hub asks for: train with its corrections, compare, sign, push, write result.json."""
    from millpond.process import die_with_parent

    die_with_parent()
    from millpond.learn.job import do_job

    with Bar() as report:
        result = do_job(directory, load(LearnSettings), device=device, on_progress=report)
    typer.echo(f"{result.version} {result.digest}: test accuracy {result.test.candidate_accuracy:.4f}")


app.command()(mlperf)
app.command("mlperf-run", hidden=True)(mlperf_run)
app.command()(tune)


def _load(data_changes: dict[str, str | bool | None]) -> Dataset:
    from millpond.learn.recipes import load_data, read_recipe

    recipe = read_recipe(None, {"data": data_changes})
    with console(stderr=True).status(f"reading {recipe.data.source}") as status:
        return load_data(
            recipe,
            load(LearnSettings),
            on_rows=lambda count: status.update(f"reading {recipe.data.source}: {count:,} rows"),
        )


def _on_the_pool(size: str, recipe: Recipe, device: str) -> Callable[[Callable[[JobProgress], None]], Hire]:
    """Return what has Paddle train on a leased device, `whole` or a part, and reports while it waits for one.

    Raises:
        MillpondError: the other options are not for that, or the pool runs no jobs.
    """
    from functools import partial

    from millpond import MillpondError
    from millpond.pool import job, monitor
    from millpond.schema import JobProgress
    from millpond.settings import PoolSettings

    if recipe.training.framework != "paddle":
        raise MillpondError(
            "--lease is for --framework paddle, which has no other way to the pool's devices. In torch: millpond pool "
            "run -- millpond learn train …"
        )
    if device != "auto":
        raise MillpondError(f"--lease trains on a device of the pool, not on {device}: leave --device out.")
    if size.isdigit():
        raise MillpondError(f"--lease is {size!r}: write `whole`, or a part of a device such as 8GiB.")
    memory_bytes = 0 if size == "whole" else monitor.parse_size(size, "--lease")
    settings = load(PoolSettings)
    job.check(settings)

    def hire(report: Callable[[JobProgress], None]) -> Hire:
        def waits(reason: str) -> None:
            report(JobProgress(stage="train", note=reason))

        return partial(job.lease_job, settings, memory_bytes=memory_bytes, on_wait=waits)

    return hire
