"""Trials as a search leaves them, without one having run."""

from __future__ import annotations

import random

import pytest

from millpond.learn.tune.record import Ended, Reported, Trial


def make_trials(count: int, epochs: int = 4) -> list[Trial]:
    """Return trials whose loss follows from `learning_rate` alone; every third one was stopped, number 5 failed."""
    rng = random.Random(0)
    trials, at_s = [], 0.0
    for number in range(count):
        trial = Trial(number, {"learning_rate": 10 ** rng.uniform(-4, -1), "max_ngram": rng.choice([1, 2, 3])})
        distance = abs(trial.parameters["learning_rate"] - 0.01)
        for epoch in range(1, 2 if number % 3 == 2 else epochs + 1):
            at_s += 1.0
            loss = 0.3 + 5 * distance + 0.2 / epoch
            trial.epochs.append(
                Reported(
                    number=number, epoch=epoch, loss=loss, accuracy=1 - loss / 2, training_loss=loss, seconds=1.0,
                    at_s=at_s,
                )
            )  # fmt: skip
        how = "failed" if number == 5 else "stopped" if number % 3 == 2 else "finished"
        trial.ended = Ended(number=number, how=how, error="it broke <here>" if how == "failed" else "", at_s=at_s)
        trials.append(trial)
    return trials


@pytest.fixture
def trials() -> list[Trial]:
    return make_trials(24)
