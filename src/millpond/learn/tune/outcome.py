"""What a search came to: its best trial, how much each parameter mattered, the best so far over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.importance import PedAnovaImportanceEvaluator

from millpond.learn.tune.record import Reported, Trial
from millpond.learn.tune.space import Parameters

GOOD_SHARE = 0.25
"""Which share of the trials counts as good where importance is asked for: more than the method's tenth, for a search
has tens of trials."""
LEAST_TRIALS = 8
"""With fewer than so many, importance would be chance."""


@dataclass(frozen=True)
class Outcome:
    """A search, looked back on."""

    trials: list[Trial]
    metric: str
    importance: dict[str, float]
    """Share of each parameter in what made good trials good, the largest first; empty where too few tell."""

    @property
    def ranked(self) -> list[Trial]:
        """Return the trials that did not fail and have a value, the best first."""
        sound = [trial for trial in self.trials if trial.state != "failed" and trial.epochs]
        return sorted(sound, key=lambda trial: (trial.objective(self.metric), trial.number))

    @property
    def winner(self) -> Trial | None:
        """Return the best trial; None where none has a value."""
        return next(iter(self.ranked), None)

    @property
    def best(self) -> Reported | None:
        """Return the best epoch of the best trial."""
        return self.winner.best(self.metric) if self.winner else None

    def count(self, state: str) -> int:
        """Return how many trials are in a state."""
        return sum(trial.state == state for trial in self.trials)

    @property
    def epochs(self) -> int:
        """Return how many epochs all trials together have done."""
        return sum(len(trial.epochs) for trial in self.trials)


def outcome_of(
    trials: Sequence[Trial], metric: str, distributions: dict[str, optuna.distributions.BaseDistribution]
) -> Outcome:
    """Return what the trials came to.

    Importance is PED-ANOVA's (Watanabe, Bansal and Hutter 2023): how differently the good trials lie in the space.
    """
    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.RandomSampler(seed=0))
    values: dict[str, set[str]] = {name: set() for name in distributions}
    told = 0
    for trial in trials:
        objective = trial.objective(metric)
        if objective is None or trial.state == "failed":
            continue
        parameters: Parameters = trial.parameters
        study.add_trial(
            optuna.trial.create_trial(params=dict(parameters), distributions=distributions, value=objective)
        )
        for name, value in parameters.items():
            values[name].add(repr(value))
        told += 1
    importance: dict[str, float] = {}
    if told >= LEAST_TRIALS and all(len(seen) > 1 for seen in values.values()):
        evaluator = PedAnovaImportanceEvaluator(target_quantile=GOOD_SHARE)
        importance = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return Outcome(list(trials), metric, importance)


def best_so_far(trials: Sequence[Trial], metric: str) -> list[tuple[int, float, float]]:
    """Return (epochs done by all trials, seconds, lowest objective) after each epoch of the search, in their order."""
    lines = sorted((line for trial in trials if trial.state != "failed" for line in trial.epochs), key=_moment)
    found: list[tuple[int, float, float]] = []
    lowest = float("inf")
    for count, line in enumerate(lines, 1):
        lowest = min(lowest, line.loss if metric == "loss" else 1 - line.accuracy)
        found.append((count, line.at_s, lowest))
    return found


def _moment(line: Reported) -> tuple[float, int]:
    return line.at_s, line.number
