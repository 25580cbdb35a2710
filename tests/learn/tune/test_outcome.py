"""What a search came to: the best trial, what mattered, pictures and page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from millpond.learn.recipes import read_recipe
from millpond.learn.tune.outcome import best_so_far, outcome_of
from millpond.learn.tune.page import write_page
from millpond.learn.tune.pictures import draw
from millpond.learn.tune.record import Trial
from millpond.learn.tune.tuning import Tuning

from .conftest import make_trials

SPACE: dict[str, BaseDistribution] = {
    "learning_rate": FloatDistribution(1e-4, 0.1, log=True),
    "max_ngram": CategoricalDistribution([1, 2, 3]),
}


def tuning(trials: list[Trial], directory: Path, metric: str = "loss") -> Tuning:
    space = {"learning_rate": {"low": 1e-4, "high": 0.1, "log": True}, "max_ngram": {"choices": [1, 2, 3]}}
    recipe = read_recipe(None, {"data": {"corpus": "imdb"}, "tune": {"space": space, "metric": metric}})
    return Tuning(directory, recipe, outcome_of(trials, metric, SPACE), 4, 60.0, (320, 80))


def test_the_winner_is_the_best_that_did_not_fail(trials: list[Trial]) -> None:
    trials[5].epochs[0] = type(trials[5].epochs[0])(**{**_fields(trials[5]), "loss": 0.0})
    outcome = outcome_of(trials, "loss", SPACE)
    assert outcome.winner is not None
    assert outcome.winner.number != 5
    assert outcome.winner.objective("loss") == min(
        epoch.loss for trial in trials if trial.number != 5 for epoch in trial.epochs
    )
    assert (outcome.count("failed"), outcome.count("finished"), outcome.count("stopped")) == (1, 16, 7)


def _fields(trial: Trial) -> dict[str, object]:
    return {name: getattr(trial.epochs[0], name) for name in trial.epochs[0].__struct_fields__}


def test_importance_finds_the_parameter_that_matters(trials: list[Trial]) -> None:
    importance = outcome_of(trials, "loss", SPACE).importance
    assert list(importance) == ["learning_rate", "max_ngram"]
    assert importance["learning_rate"] > 0.8
    assert sum(importance.values()) == pytest.approx(1.0)


def test_importance_of_too_few_trials_is_not_told() -> None:
    assert outcome_of(make_trials(6), "loss", SPACE).importance == {}


def test_the_best_so_far_only_falls(trials: list[Trial]) -> None:
    found = best_so_far(trials, "accuracy")
    assert [count for count, _, _ in found] == list(range(1, len(found) + 1))
    lowest = [value for _, _, value in found]
    assert lowest == sorted(lowest, reverse=True)
    assert lowest[-1] == outcome_of(trials, "accuracy", SPACE).winner.objective("accuracy")  # type: ignore[union-attr]


def test_pictures_and_page_show_the_search(trials: list[Trial], tmp_path: Path) -> None:
    done = tuning(trials, tmp_path)
    draw(done, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "history.png", "curves.png", "importance.png", "parameters.png"
    }  # fmt: skip
    write_page(done, tmp_path / "tuning.html")
    page = (tmp_path / "tuning.html").read_text()
    assert "24 trials" in page
    assert "it broke &lt;here&gt;" in page
    assert page.count("<svg") == 4
    assert not re.search(r"(src|href)=\"http", page)


def test_a_search_of_one_trial_by_accuracy_has_pictures_too(tmp_path: Path) -> None:
    done = tuning(make_trials(1), tmp_path, "accuracy")
    draw(done, tmp_path)
    assert not (tmp_path / "importance.png").exists()
    write_page(done, tmp_path / "tuning.html")
    assert done.summary()["best"]["number"] == 0
