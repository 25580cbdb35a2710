"""What a search varies: read from a recipe, checked before any work, and put into a recipe again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from millpond.learn.datasets import DataError, Dataset
from millpond.learn.recipes import Recipe, read_recipe
from millpond.learn.tune.space import PATIENCE, SPACES, applied, distributions, fitting, impatient, space_of, start_of
from millpond.learn.tune.tuning import winning_recipe


def recipe(model: str = "ngram", space: dict[str, Any] | None = None, **more: Any) -> Recipe:
    given = {"data": {"corpus": "imdb"}, "model": {"architecture": model}, "tune": {"space": space or {}}}
    return read_recipe(None, given | more)


@pytest.mark.parametrize("model", ["ngram", "seqcnn", "lstm"])
def test_each_model_has_a_space_whose_values_it_takes_and_its_defaults_are_in_it(model: str) -> None:
    space = space_of(recipe(model))
    assert space == SPACES[model]
    assert start_of(recipe(model), space, 25_000) is not None
    assert distributions(model, space).keys() == space.keys()


def test_a_recipe_says_what_is_varied(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        "[data]\ncorpus = 'imdb'\n[model]\narchitecture = 'seqcnn'\n[tune]\nmetric = 'accuracy'\n[tune.space]\n"
        "learning_rate = { low = 1e-4, high = 1e-2, log = true }\nfilters = { low = 8, high = 64 }\n"
        "dropout = { low = 0, high = 1e-1 }\nschedule = { choices = ['constant', 'linear'] }\n"
    )
    found = read_recipe(path)
    assert found.tune is not None
    assert found.tune.metric == "accuracy"
    space = space_of(found)
    assert distributions("seqcnn", space) == {
        "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
        "filters": IntDistribution(8, 64),
        "dropout": FloatDistribution(0.0, 0.1),
        "schedule": CategoricalDistribution(["constant", "linear"]),
    }
    changed = applied(found, {"learning_rate": 0.005, "filters": 16, "dropout": 0.05, "schedule": "linear"})
    assert (changed.training.learning_rate, changed.training.schedule) == (0.005, "linear")
    assert changed.model.options == {"filters": 16, "dropout": 0.05}
    assert start_of(found, space, 25_000) is None  # the default dropout is none of them


def test_what_the_recipe_sets_is_not_varied() -> None:
    fixed = recipe(model="ngram", training={"learning_rate": 0.02})
    assert space_of(fixed).keys() == SPACES["ngram"].keys() - {"learning_rate"}


def test_a_trial_ends_when_it_gets_no_better_unless_the_recipe_says_otherwise() -> None:
    assert impatient(recipe()).training.patience == PATIENCE
    assert impatient(recipe(training={"patience": 0})).training.patience == 0


def test_the_winner_learns_from_all_rows_for_as_long_as_was_best(small: Dataset) -> None:
    searched = impatient(recipe(space={"smoothing": {"low": 1, "high": 2}}))
    winner = winning_recipe(searched, small, {"smoothing": 1.5}, 2)
    assert (winner.validation, winner.training.epochs, winner.training.patience) == (0.0, 2, 0)
    assert (winner.model.options, winner.tune) == ({"smoothing": 1.5}, None)
    own = winning_recipe(searched, replace(small, validation=small.test), {"smoothing": 1.5}, 2)
    assert own.training == searched.training  # the data's own validation chooses


def test_with_few_rows_the_size_of_a_batch_follows_from_them() -> None:
    whole = recipe()
    space = space_of(whole)
    assert fitting(whole, space, 20_000) == space
    few = fitting(whole, space, 400)
    assert few.keys() == space.keys() - {"batch_size"}
    assert start_of(whole, few, 400) is not None
    own = recipe(space={"batch_size": {"choices": [8, 1024]}})
    assert fitting(own, space_of(own), 400) == space_of(own)


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"learning_rat": {"low": 1, "high": 2}}, "ngram has no such option.*learning_rate"),
        ({"epochs": {"low": 1, "high": 2}}, "cannot be varied: the search itself decides"),
        ({"smoothing": {"low": 2.0, "high": 2.0}}, "the range from 2 to 2 is empty"),
        ({"smoothing": {"low": 3, "high": 2}}, "is empty"),
        ({"smoothing": {"low": float("nan"), "high": 2}}, "is empty"),
        ({"smoothing": {"low": 1.0, "high": float("inf")}}, "is empty"),
        ({"smoothing": {"low": 1.0}}, "give `low` and `high`"),
        ({"smoothing": {}}, "give `low` and `high`"),
        ({"smoothing": {"choices": []}}, "length >= 1"),
        ({"smoothing": {"choices": [1.0, 1.0]}}, "stands there twice"),
        ({"smoothing": {"choices": [1.0], "low": 1, "high": 2}}, "not both"),
        ({"smoothing": {"choices": ["much"]}}, "smoothing cannot be 'much'"),
        ({"smoothing": {"low": -1, "high": 2}}, "cannot be -1"),
        ({"start": {"low": 0, "high": 2, "log": True}}, "with `log`"),
        ({"max_ngram": {"low": 0.5, "high": 2}}, "cannot be 0.5"),
        ({"max_ngram": {"low": 1, "high": 9}}, "cannot be 9"),
        ({"learning_rate": {"low": 0, "high": 1}}, "cannot be 0"),
        ({"schedule": {"low": 0, "high": 1}}, "is no number: give `choices`"),
        ({"schedule": {"choices": ["often"]}}, "Invalid enum value 'often'"),
        ({"smoothing": {"lo": 1, "high": 2}}, "unknown field `lo`"),
        ({"smoothing": 3}, "Expected `object`"),
    ],
)
def test_a_space_that_cannot_be_searched_is_explained(space: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        space_of(recipe(space=space))


def test_a_recipe_that_leaves_nothing_to_vary_is_explained() -> None:
    options = {name: values.ends[0] for name, values in SPACES["ngram"].items()}
    training = {name: options.pop(name) for name in ("learning_rate", "batch_size")}
    fixed = recipe(model="ngram", training=training)
    fixed = msgspec.structs.replace(fixed, model=msgspec.structs.replace(fixed.model, options=options))
    with pytest.raises(DataError, match="nothing to vary"):
        space_of(fixed)
