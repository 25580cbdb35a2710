"""From a recipe to the best version of it: search, pictures, and the winner trained on all training rows.

The search sees the training split only; the test split is read once, for the winner.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from millpond.learn.checkpoint import is_checkpointed
from millpond.learn.datasets import BadRows, DataError, Dataset, Row, Split, split_digest
from millpond.learn.fit import Report
from millpond.learn.local_ray import local_ray
from millpond.learn.prepared import PreparedSets
from millpond.learn.recipes import DataTable, Recipe, hold_back, load_data, shown_recipe, used_rows
from millpond.learn.run import CHECKPOINTS, Run, run
from millpond.learn.train import complete
from millpond.learn.tune.outcome import Outcome, outcome_of
from millpond.learn.tune.record import FORMAT, NAME, Begun, Line, Record, TuneError
from millpond.learn.tune.space import (
    Parameters,
    TuneTable,
    applied,
    distributions,
    fitting,
    impatient,
    space_of,
    start_of,
)
from millpond.learn.tune.trial import ENCODINGS, KEEP_BYTES, ROWS
from millpond.learn.tune.trial_process import LOG, Setup
from millpond.registry import PushedModel
from millpond.schema import JobProgress
from millpond.settings import LearnSettings

WINNER, SUMMARY, RECIPE = "winner", "tuning.json", "winner.toml"


@dataclass(frozen=True)
class Budget:
    """How much is searched, and on what; `trials` and `minutes` count from the beginning, earlier sessions included."""

    trials: int | None
    minutes: float | None
    concurrent: int = 1
    cpus: float = 1.0
    """Of each trial, as `gpus`."""
    gpus: float = 0.0


@dataclass
class Tuning:
    """What a search came to; its files are in `directory`."""

    directory: Path
    recipe: Recipe
    outcome: Outcome
    epochs: int
    """The most that a trial may do."""
    spent_s: float
    rows: tuple[int, int]
    """Learned from, and measured on."""
    interrupted: bool = False
    winner: Run | None = None
    pushed: PushedModel | None = None

    def summary(self) -> dict[str, Any]:
        """Return it in plain values, as tuning.json holds it."""
        outcome, metric = self.outcome, self.outcome.metric
        best, winner = outcome.best, outcome.winner
        return {
            "directory": str(self.directory),
            "recipe": shown_recipe(self.recipe),
            "metric": metric,
            "rows": {"learned": self.rows[0], "measured": self.rows[1]},
            "interrupted": self.interrupted,
            "search_s": round(self.spent_s, 1),
            "epochs": outcome.epochs,
            "best": winner
            and best
            and {
                "number": winner.number,
                "parameters": winner.parameters,
                "epoch": best.epoch,
                "loss": best.loss,
                "accuracy": best.accuracy,
            },
            "importance": outcome.importance,
            "trials": [
                {
                    "number": trial.number,
                    "state": trial.state,
                    "parameters": trial.parameters,
                    "epochs": [[epoch.loss, epoch.accuracy] for epoch in trial.epochs],
                    "error": trial.ended.error if trial.ended else "",
                }
                for trial in outcome.trials
            ],
            "winner": self.winner and self.winner.summary(),
            "registered": self.pushed
            and {"name": self.pushed.name, "version": self.pushed.version, "digest": self.pushed.digest},
        }


def tune(
    recipe: Recipe,
    settings: LearnSettings,
    *,
    budget: Budget,
    device: str,
    name: str,
    out: Path | None,
    report: Report,
    resume: bool = False,
    prefix: tuple[str, ...] = (),
    publish: Callable[[Path], PushedModel] | None = None,
    on_search: Callable[[Record, Line | None], None] = lambda record, line: None,
) -> Tuning:
    """Search, draw, train the winner on all training rows, and give it to `publish`; all into `out`.

    `on_search` is told of each line of the record, and with None when the search begins and ends. Ctrl-C in the search
    ends it with what was found; no winner is then trained. With `resume` the search in `out`, or the newest that has
    not ended, goes on; trials that have ended are not run again.

    Raises:
        DataError: the recipe, its space or its data cannot be used.
        TuneError: the record cannot be read or written, is of another search, or every trial failed.
        RayError: Ray does not start.
    """
    table = recipe.tune or TuneTable()
    if recipe.distil is not None:
        raise DataError("a search does not teach: take [distil] out, and train the winner with --teacher.")
    space = space_of(recipe)
    directory = _directory(out, settings.home / "tunings", recipe.model.architecture, resume)
    report(JobProgress(stage="data", note=f"reading {recipe.data.source}"))
    dataset = load_data(recipe, settings)
    used, _ = used_rows(recipe, dataset)
    learned, held = hold_back(msgspec.structs.replace(recipe, validation=table.validation), dataset, used)
    if held is None:
        raise DataError(
            f"of {len(used):,} training rows none can be held back to measure trials on: each is the last of its "
            "class. Give more rows."
        )
    space = fitting(recipe, space, len(learned))
    recipe = msgspec.structs.replace(impatient(recipe), tune=msgspec.structs.replace(table, space=space))
    how = complete(recipe.training, recipe.model.architecture, len(learned))
    if not how.epochs:
        raise DataError("a search needs trials of at least one epoch: set `epochs` of [training] above 0.")
    stamp = f"{split_digest(learned)}/{split_digest(held)}"
    begun = Begun(format=FORMAT, search=_plain(recipe), data=stamp)
    path = directory / NAME
    record = Record.open(path) if resume else Record.create(path, begun)
    try:
        record.check(begun)
        share(directory, dataset, learned, held, stamp)
        found = distributions(recipe.model.architecture, space)
        setup = Setup(
            recipe=msgspec.to_builtins(msgspec.structs.replace(recipe, data=DataTable(file="rows"))),
            directory=str(directory.resolve()),
            rows=stamp,
            device="auto" if prefix else device,  # what the prefix gives, such as a lease; else it would lie idle
            threads=max(1, int(budget.cpus)),
            memory_share=budget.gpus if 0 < budget.gpus < 1 else None,
        )
        on_search(record, None)
        interrupted = False
        try:
            cpus, gpus = (_whole(each * budget.concurrent) for each in (budget.cpus, budget.gpus))
            with local_ray(cpus=cpus, gpus=gpus) as scratch:
                from millpond.learn.tune.search import search  # Ray, which reads its settings when it is loaded

                search(
                    record,
                    found,
                    table,
                    setup,
                    budget,
                    epochs=how.epochs,
                    seed=recipe.seed,
                    start=start_of(recipe, space, len(learned)) if table.start else None,
                    prefix=prefix,
                    scratch=scratch,
                    on_line=lambda line: on_search(record, line),
                )
        except KeyboardInterrupt:
            interrupted = True
        on_search(record, None)
        outcome = outcome_of(record.trials, table.metric, found)
        rows = (len(learned), len(held))
        done = Tuning(directory, recipe, outcome, how.epochs, record.spent_s, rows, interrupted)
        _write_pictures(done)
        if interrupted:
            return done
        if outcome.winner is None or outcome.best is None:
            errors = [trial.ended.error for trial in record.trials if trial.ended and trial.ended.error]
            why = f"; the first failed: {errors[0]}" if errors else ""
            raise TuneError(
                f"none of {len(record.trials)} trials has a value{why}. See {directory / LOG}; narrow the space, or "
                "give more time."
            )
        best = winning_recipe(recipe, dataset, outcome.winner.parameters, outcome.best.epoch)
        (directory / RECIPE).write_text(_toml(best), encoding="utf-8")
        place = directory / WINNER
        goes_on = is_checkpointed(place / CHECKPOINTS)
        if not goes_on:
            shutil.rmtree(place, ignore_errors=True)  # a winner whose training was cut off before its first checkpoint
        done.winner = run(best, settings, device=device, name=name, out=place, report=report, resume=goes_on)
        if done.winner.trained.training.interrupted:
            done.interrupted = True
            return done
        if publish is not None:
            done.pushed = publish(place / "model")
        _write_pictures(done)
        (directory / SUMMARY).write_bytes(msgspec.json.format(msgspec.json.encode(done.summary())))
        for shared in (ROWS, ENCODINGS):
            shutil.rmtree(directory / shared, ignore_errors=True)
        return done
    finally:
        record.close()


def winning_recipe(recipe: Recipe, dataset: Dataset, parameters: Parameters, epochs: int) -> Recipe:
    """Return the recipe that trains the winner: on all training rows, for as many epochs as were best for it.

    A validation split that the data itself brings stays one, and chooses the best epoch.
    """
    best = applied(recipe, parameters)
    if dataset.validation is not None:
        return msgspec.structs.replace(best, tune=None)
    training = msgspec.structs.replace(best.training, epochs=epochs, patience=0)
    return msgspec.structs.replace(best, tune=None, training=training, validation=0.0)


def _directory(out: Path | None, tunings: Path, architecture: str, resume: bool) -> Path:
    """Return the directory of the search: a new one, or with `resume` that of one that has not ended."""
    if resume:
        begun = [place for place in tunings.glob("*") if (place / NAME).exists()]
        unfinished = [place for place in begun if not (place / SUMMARY).exists()]
        if out is None and not unfinished:
            raise TuneError(f"no search below {tunings} is unfinished: there is nothing to resume. Leave --resume out.")
        directory = out or max(unfinished, key=lambda place: (place / NAME).stat().st_mtime)
        if (directory / SUMMARY).exists():
            raise TuneError(f"the search in {directory} has ended; its winner is there. Give another --out.")
        return directory
    directory = out or tunings / f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-{architecture}"
    if directory.exists() and any(directory.iterdir()):
        hint = " Or go on with the search in it: --resume." if (directory / NAME).exists() else ""
        raise DataError(
            f"{directory} is not empty; a search writes into a directory of its own. Give another --out.{hint}"
        )
    return directory


def _plain(recipe: Recipe) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(recipe)
    for irrelevant in ("data", "distil", "validation", "correction_weight"):
        del plain[irrelevant]
    return plain


def share(directory: Path, dataset: Dataset, learned: Split, held: Split, stamp: str) -> None:
    """Write the rows where trials map them; what they are measured on lies there as the test split."""

    def rows() -> Any:
        for split, part in ((learned, "train"), (held, "test")):
            for text, label in zip(split.texts, split.labels.tolist(), strict=True):
                row: Row = (text, dataset.labels[label], part, "")  # type: ignore[assignment]
                yield row

    PreparedSets(directory / ROWS, KEEP_BYTES).prepare(
        "rows", rows(), BadRows(), stamp=stamp, source="a search", seed=0, sort=False
    )


def _whole(amount: float) -> int:
    return int(-(-amount // 1))


def _write_pictures(done: Tuning) -> None:
    from millpond.learn.tune.page import write_page
    from millpond.learn.tune.pictures import draw

    if any(trial.epochs for trial in done.outcome.trials):
        draw(done, done.directory)
        write_page(done, done.directory / "tuning.html")


def _toml(recipe: Recipe) -> str:
    """Return a recipe as the file that trains it, without what is secret in a URL."""
    tables: list[tuple[str, dict[str, Any]]] = [("", shown_recipe(recipe))]
    lines = ["# The winner of a search; `millpond learn train --recipe` trains it again."]
    while tables:
        name, table = tables.pop(0)
        values = {key: value for key, value in table.items() if value is not None and not isinstance(value, dict)}
        if name and values:
            lines += ["", f"[{name}]"]
        # A JSON string, number or boolean is one of TOML's too.
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
        inner = [(f"{name}.{key}".lstrip("."), value) for key, value in table.items() if isinstance(value, dict)]
        tables = inner + tables
    return "\n".join(lines) + "\n"
