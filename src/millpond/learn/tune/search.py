"""The search: Ray Tune runs the trials, Optuna chooses their values, ASHA ends those that others are better than.

Ray gets no state of ours to keep: what trials came to is in the record, from which a search goes on. ASHA: Li et al.,
"A System for Massively Parallel Hyperparameter Tuning", 2020.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from millpond.learn.tune.record import Ended, Line, Record, Reported, Started, Trial, TuneError
from millpond.learn.tune.space import Parameters, TuneTable
from millpond.learn.tune.trainable import OBJECTIVE, TrialRunner
from millpond.learn.tune.trial_process import Setup

if TYPE_CHECKING:
    from millpond.learn.tune.tuning import Budget

FAILED = 1e9
"""Objective of a trial that failed, for Optuna and ASHA: worse than any other. The record holds none."""
STARTUP_TRIALS = 8
"""Trials by chance before the others are learned from."""


def search(
    record: Record,
    distributions: dict[str, optuna.distributions.BaseDistribution],
    table: TuneTable,
    setup: Setup,
    budget: Budget,
    *,
    epochs: int,
    seed: int,
    start: Parameters | None,
    prefix: Sequence[str],
    scratch: Path,
    on_line: Callable[[Line], None] = lambda line: None,
) -> None:
    """Run trials until the budget is used up, each line of what happens into `record` and then to `on_line`.

    Trials of the record that have ended are what the search knows; those that were cut off run first, from their
    beginning. Ctrl-C leaves by KeyboardInterrupt.

    Raises:
        TuneError: the record cannot be written.
    """
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    ended = [trial for trial in record.trials if trial.ended]
    cut_off = [trial for trial in record.trials if not trial.ended]
    left = None if budget.trials is None else max(budget.trials - len(ended), len(cut_off))
    left_s = None if budget.minutes is None else budget.minutes * 60 - record.spent_s
    if left == 0 or (left_s is not None and left_s <= 0):
        return
    first = [trial.parameters for trial in cut_off] + ([start] if start is not None and not record.trials else [])
    algorithm = OptunaSearch(
        distributions,
        metric=OBJECTIVE,
        mode="min",
        sampler=sampler_of(table, seed + len(record.trials)),
        points_to_evaluate=first,
    )
    asha = ASHAScheduler(
        time_attr="epoch", metric=OBJECTIVE, mode="min", max_t=epochs, reduction_factor=table.reduction
    )
    for trial in ended:
        _tell(algorithm, asha, trial, table.metric)
    listener = _Listener(record, cut_off, on_line, None if left_s is None else time.monotonic() + left_s)
    runner = tune.with_parameters(TrialRunner, setup=setup, metric=table.metric, failed=FAILED, prefix=list(prefix))
    tuner = tune.Tuner(
        tune.with_resources(runner, {"cpu": budget.cpus} | ({"gpu": budget.gpus} if budget.gpus else {})),
        tune_config=tune.TuneConfig(
            search_alg=algorithm,
            scheduler=asha,
            num_samples=-1 if left is None else left,
            time_budget_s=left_s,
            max_concurrent_trials=budget.concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="search", storage_path=str(scratch / "tune"), verbose=0, callbacks=[listener]),
    )
    try:
        with contextlib.redirect_stdout(None):  # it greets
            tuner.fit()
    except Exception as error:
        raise listener.error or TuneError(f"Ray Tune cannot go on: {error}. What is done stays: --resume.") from error


def sampler_of(table: TuneTable, seed: int) -> optuna.samplers.BaseSampler:
    """Return what chooses the values of trials."""
    if table.search == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=STARTUP_TRIALS, constant_liar=True)


def _tell(algorithm: OptunaSearch, asha: ASHAScheduler, trial: Trial, metric: str) -> None:
    """Have both know a trial of an earlier session as if they had seen it."""
    objective = trial.objective(metric)
    is_failed = trial.state == "failed" or objective is None
    algorithm.add_evaluated_point(trial.parameters, FAILED if is_failed or objective is None else objective)
    # ASHA asks a trial for its name only.
    known: Any = SimpleNamespace(trial_id=f"before-{trial.number}")
    asha.on_trial_add(None, known)
    for count in range(1, len(trial.epochs) + 1):
        so_far = Trial(trial.number, trial.parameters, trial.epochs[:count]).objective(metric)
        asha.on_trial_result(None, known, {"epoch": count, OBJECTIVE: so_far})


class _Listener(tune.Callback):  # type: ignore[misc]  # mypy does not look into Ray
    """Writes what happens into the record."""

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Ray writes what it is given to disk, and nothing is read from there again."""
        return {}

    def __init__(
        self, record: Record, cut_off: Sequence[Trial], on_line: Callable[[Line], None], deadline: float | None
    ) -> None:
        self.error: TuneError | None = None
        self._record, self._on_line, self._deadline = record, on_line, deadline
        self._cut_off = list(cut_off)
        self._began, self._before_s = time.monotonic(), record.spent_s
        self._numbers: dict[str, int] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        again = next((known for known in self._cut_off if known.parameters == trial.config), None)
        if again is not None:
            self._cut_off.remove(again)
        number = len(self._record.trials) if again is None else again.number
        self._numbers[trial.trial_id] = number
        self._add(Started(number=number, parameters=_plain(trial.config), at_s=self._at_s()))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        number = self._numbers[trial.trial_id]
        if "loss" in result and result["epoch"] > len(self._record.trials[number].epochs):
            names = ("epoch", "loss", "accuracy", "training_loss", "seconds")
            self._add(Reported(number=number, at_s=self._at_s(), **{name: result[name] for name in names}))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        error = result.get("error", "")
        is_over = self._is_over()
        how = "failed" if error else "finished" if result.get("done_by_itself") else "expired" if is_over else "stopped"
        self._end(trial, how, error)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "failed", "Ray could not run it")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """End the trials that still ran as the time was up: Ray tells their end to nobody."""
        if self._is_over():
            for trial in self._record.trials:
                if not trial.ended:
                    self._add(Ended(number=trial.number, how="expired", error="", at_s=self._at_s()))

    def _end(self, trial: Any, how: Any, error: str) -> None:
        self._add(Ended(number=self._numbers[trial.trial_id], how=how, error=error, at_s=self._at_s()))

    def _is_over(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _at_s(self) -> float:
        return round(self._before_s + time.monotonic() - self._began, 3)

    def _add(self, line: Line) -> None:
        try:
            self._record.add(line)
        except TuneError as error:
            self.error = error
            raise
        self._on_line(line)


def _plain(parameters: dict[str, Any]) -> Parameters:
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in parameters.items()}
