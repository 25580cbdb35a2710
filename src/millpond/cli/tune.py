"""`millpond learn tune`: search for the options that a model learns best with, train the winner, register it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from millpond.cli.training_options import (
    AsJson,
    CorpusName,
    Database,
    DataFile,
    Device,
    DropLeaks,
    LabelColumn,
    ModelName,
    Query,
    RecipeFile,
    SplitColumn,
    TestFile,
    TextColumn,
    TrainRows,
    data_changes,
    model_options,
)
from millpond.cli.training_output import Bar, console, show_bad_rows, show_evaluation
from millpond.settings import LearnSettings, RegistrySettings, load

if TYPE_CHECKING:
    from millpond.learn.tune.outcome import Outcome
    from millpond.learn.tune.record import Line, Record, Trial
    from millpond.learn.tune.tuning import Tuning
    from millpond.registry import PushedModel

SHOWN_BEST = 10
SHOWN_RUNNING = 8
TRIALS = 30
"""What is searched where no budget is given."""


def tune(
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
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the model that is not varied, name=value; repeatable.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="The most epochs of a trial.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of splits, order, first weights and the search.")] = None,
    train_rows: TrainRows = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help=f"Trials to run in all; without it and --minutes: {TRIALS}.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, max=1e6, help="Minutes to search in all.")] = None,
    concurrent: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Trials at a time; default: as many as cores or GPUs allow.")
    ] = None,
    cpus_per_trial: Annotated[float, typer.Option(min=0.1, max=1024, help="Cores of a trial.")] = 1.0,
    gpus_per_trial: Annotated[
        float, typer.Option(min=0, max=64, help="GPUs of this machine for a trial; 0.5: two trials share one.")
    ] = 0.0,
    lease: Annotated[
        str | None, typer.Option(help="Run each trial on the pool, in a lease on so much memory, such as 4GiB.")
    ] = None,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="Directory of the search; default: tunings/ under the home.")] = None,
    name: Annotated[str, typer.Option(help="Name that the winner carries.")] = "sentiment",
    register: Annotated[
        bool, typer.Option("--register", help="Sign the winner and push it into the registry, tagged candidate.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the search in --out, or the newest, that did not end.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Search for better options with Ray Tune and Optuna, train the winner on all training rows, test it once."""
    from millpond.learn.recipes import read_recipe
    from millpond.learn.tune.tuning import Budget
    from millpond.learn.tune.tuning import tune as search_and_train

    changes = {
        "data": data_changes(corpus, file, test_file, text, label, split, query, database, drop_leaks),
        "model": {"architecture": model, "options": model_options(option)},
        "training": {"epochs": epochs},
        "seed": seed,
        "train_rows": train_rows,
    }
    recipe = read_recipe(recipe_file, changes)
    if trials is None and minutes is None:
        trials = TRIALS
    budget = Budget(
        trials=trials,
        minutes=minutes,
        concurrent=_concurrent(concurrent, cpus_per_trial, gpus_per_trial),
        cpus=cpus_per_trial,
        gpus=gpus_per_trial,
    )
    prefix: tuple[str, ...] = ()
    if lease is not None:
        from millpond.pool.monitor import parse_size

        parse_size(lease, "--lease")  # else each trial would find out
        prefix = (sys.executable, "-m", "millpond", "pool", "run", "--memory", lease, "--")

    def publish(directory: Path) -> PushedModel:
        from millpond.learn.publish import publish

        return publish(directory, load(RegistrySettings), name=name, tags=["candidate"])

    bar = Bar()
    with bar as report, _Search(trials, minutes, bar) as shown:
        done = search_and_train(
            recipe,
            load(LearnSettings),
            budget=budget,
            device=device,
            name=name,
            out=out,
            report=report,
            resume=resume,
            prefix=prefix,
            publish=publish if register else None,
            on_search=shown.tell,
        )
    if as_json:
        typer.echo(json.dumps(done.summary(), indent=2))
    else:
        _show_tuning(done)
    if done.interrupted:
        typer.echo(f"Interrupted. Go on with it: --resume --out {done.directory}", err=True)
        raise typer.Exit(130)


def _concurrent(given: int | None, cpus: float, gpus: float) -> int:
    """Return how many trials run at a time."""
    from millpond.learn.tune.record import TuneError

    most = max(1, int((os.cpu_count() or 1) / cpus))
    if gpus:
        import torch

        have = torch.cuda.device_count()
        if not have:
            raise TuneError(
                "--gpus-per-trial: this machine has no GPU that PyTorch sees. Leave it out; or have trials take "
                "parts of the pool's devices: --lease 4GiB."
            )
        most = max(1, min(most, int(have / gpus)))
        if gpus > have:
            raise TuneError(f"--gpus-per-trial {gpus:g}: this machine has {have}.")
    return given or most


# --- what is shown -----------------------------------------------------------------------------------------------


class _Search:
    """Shows a search on stderr: on a terminal as a table that lives, elsewhere as a line for each epoch and end."""

    def __init__(self, trials: int | None, minutes: float | None, bar: Bar) -> None:
        self._trials, self._minutes, self._bar = trials, minutes, bar
        self._console = console(stderr=True)
        self._live: Live | None = None
        self._record: Record | None = None

    def __enter__(self) -> _Search:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._bar.show()

    def tell(self, record: Record, line: Line | None) -> None:
        """Take in a line of the record; None: the search begins or ends."""
        first = self._record is None
        self._record = record
        if not self._console.is_terminal:
            if line is not None:
                self._print(line)
            elif first:
                known = sum(trial.ended is not None for trial in record.trials)
                before = f"; {known} trials are done already" if known else ""
                typer.echo(f"search    starting Ray{before}", err=True)
        elif line is None and first:
            self._bar.hide()
            self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        elif line is None:
            self.__exit__()

    def _print(self, line: Line) -> None:
        from millpond.learn.tune.page import shown
        from millpond.learn.tune.record import Ended, Reported, Started

        if isinstance(line, Started):
            values = ", ".join(f"{name} {shown(value)}" for name, value in line.parameters.items())
            typer.echo(f"trial {line.number:<4}{values}", err=True)
        elif isinstance(line, Reported):
            typer.echo(
                f"trial {line.number:<4}epoch {line.epoch}: validation loss {line.loss:.4f}, accuracy "
                f"{line.accuracy:.2%}",
                err=True,
            )
        elif isinstance(line, Ended):
            typer.echo(f"trial {line.number:<4}{line.how}{f': {line.error}' if line.error else ''}", err=True)

    def _table(self) -> Group:
        """Return the best trials, those that run, and how much of the budget is used."""
        from millpond.learn.tune.outcome import Outcome
        from millpond.learn.tune.space import TuneTable

        record = self._record
        assert record is not None
        table = record.begun.search.get("tune") or {}
        outcome = Outcome(list(record.trials), table.get("metric", TuneTable().metric), {})
        running = [trial for trial in outcome.trials if trial.ended is None][:SHOWN_RUNNING]
        best = [trial for trial in outcome.ranked if trial.ended is not None][:SHOWN_BEST]
        ended = sum(trial.ended is not None for trial in outcome.trials)
        trials = f"{ended} of {self._trials} trials" if self._trials else f"{ended} trials"
        of = f" of {self._minutes:g}" if self._minutes else ""
        spent = f"{record.spent_s / 60:.1f}{of} min"
        counts = ", ".join(f"{outcome.count(state)} {state}" for state in ("finished", "stopped", "failed"))
        head = Text(f"{trials} ({counts}), {outcome.epochs} epochs, {spent}. Ctrl-C ends the search and keeps it.")
        if not outcome.trials:
            return Group(Text("Starting Ray, and the first trials …"))
        return Group(head, _trials_table([*best, *running], outcome))


def _trials_table(trials: list[Trial], outcome: Outcome) -> Table:
    from millpond.learn.tune.page import shown

    names = list(outcome.trials[0].parameters)
    table = Table("trial", "loss", "accuracy", "epochs", "", *map(escape, names), box=None, pad_edge=False)
    winner = outcome.winner
    for trial in trials:
        best = trial.best(outcome.metric)
        numbers = (f"{best.loss:.4f}", f"{best.accuracy:.2%}") if best else ("", "")
        values = (escape(shown(trial.parameters[name])) for name in names)
        style = "bold" if trial is winner else "dim" if trial.ended is None else None
        table.add_row(str(trial.number), *numbers, str(len(trial.epochs)), trial.state, *values, style=style)
    return table


def _show_tuning(done: Tuning) -> None:
    to = console()
    if not to.is_terminal:  # a file or a pipe has no edge
        to.width = 200
    outcome = done.outcome
    if not outcome.trials:
        return
    to.print(_trials_table(outcome.ranked[:SHOWN_BEST], outcome))
    counts = ", ".join(
        f"{count} {state}" for state in ("finished", "stopped", "expired", "failed") if (count := outcome.count(state))
    )
    to.print(
        f"{len(outcome.trials)} trials ({counts}), {outcome.epochs} epochs in {done.spent_s:.0f} s; each learned from "
        f"{done.rows[0]:,} rows and was measured on {done.rows[1]:,}.",
        soft_wrap=True,
    )
    if outcome.importance:
        shares = ", ".join(f"{escape(name)} {share:.0%}" for name, share in outcome.importance.items())
        to.print(f"What mattered: {shares}.", soft_wrap=True)
    if done.winner is not None and outcome.winner is not None and outcome.best is not None:
        rows = f"{done.winner.trained.train_rows:,}"
        to.print(
            f"Trial {outcome.winner.number} won; trained on all {rows} rows for "
            f"{len(done.winner.trained.training.epochs)} epochs:"
        )
        show_bad_rows(done.winner.dataset)
        show_evaluation(done.winner.evaluation, done.winner.dataset)
        to.print(f"Model: {done.winner.directory}\nRecipe: {done.directory / 'winner.toml'}", soft_wrap=True)
    if done.pushed is not None:
        to.print(f"Registered: {done.pushed.name} {done.pushed.version}, candidate, {done.pushed.digest}")
    to.print(f"Page: {done.directory / 'tuning.html'}", soft_wrap=True)
