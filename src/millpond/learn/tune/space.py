"""What a search varies, as typed data: the `[tune]` table of a recipe, and a space for each model that names none.

A parameter is an option of training or of the model, by its name. What is not varied stays as the recipe has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta, inspect

from millpond.learn.datasets import DataError
from millpond.learn.models import MODELS, ModelError, options_of
from millpond.learn.options import TrainOptions
from millpond.learn.train import MIN_STEPS, complete

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from millpond.learn.recipes import Recipe

Value = int | float | str | bool
Parameters = dict[str, Value]
"""One value for each name of a space."""
MAX_CHOICES = 100
PATIENCE = 2
"""Epochs without a better validation loss after which a trial ends: ASHA stops who is worse, not who is done."""
NOT_VARIED = {
    "epochs": "the search itself decides how many epochs a trial gets; `epochs` of [training] is the most",
    "config": "it belongs to `pretrained`",
}


class Range(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The values of one parameter: all from `low` to `high`, or one of `choices`."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    """Whether each factor of ten is as likely as the next."""
    choices: Annotated[list[Value], Meta(min_length=1, max_length=MAX_CHOICES)] | None = None

    @property
    def ends(self) -> list[Value]:
        """Return the values that must all be possible for every other one to be."""
        return [*self.choices] if self.choices is not None else [self.low or 0, self.high or 0]

    def admits(self, value: object) -> bool:
        """Return whether a value is in it."""
        if self.choices is not None:
            return value in self.choices
        return isinstance(value, int | float) and (self.low or 0) <= value <= (self.high or 0)


class TuneTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[tune]`: how a search goes; `[tune.space]`: what it varies, by the name of the option."""

    space: dict[str, Range] = {}
    """Empty: that of the model, in `SPACES`."""
    validation: Annotated[float, Meta(gt=0, le=0.5)] = 0.2
    """Share of the rows used that trials are measured on; the winner learns from these too."""
    metric: Literal["loss", "accuracy"] = "loss"
    """What of validation is made best."""
    search: Literal["tpe", "random"] = "tpe"
    """How the next trial is chosen: by what the others came to (tree-structured Parzen estimators), or by chance."""
    start: bool = True
    """Whether the first trial is the recipe as it stands, if its values are in the space."""
    reduction: Annotated[float, Meta(gt=1, le=100)] = 3.0
    """Of the trials that have done 1, 3, 9 … epochs (its powers), about one in so many goes on."""


SPACES: dict[str, dict[str, Range]] = {
    "ngram": {
        "learning_rate": Range(low=0.001, high=0.1, log=True),
        "batch_size": Range(choices=[128, 256, 512, 1024]),
        "smoothing": Range(low=0.5, high=64.0, log=True),
        "start": Range(low=0.001, high=0.1, log=True),
        "max_ngram": Range(choices=[1, 2, 3]),
        "min_count": Range(choices=[1, 2, 3]),
    },
    "seqcnn": {
        "learning_rate": Range(low=2e-4, high=2e-2, log=True),
        "batch_size": Range(choices=[16, 32, 64]),
        "embedding": Range(choices=[32, 64, 128]),
        "filters": Range(choices=[32, 64, 96, 128, 192]),
        "dropout": Range(low=0.0, high=0.7),
        "embedding_dropout": Range(low=0.0, high=0.5),
        "min_count": Range(choices=[0, 10, 30, 75, 150]),
    },
    "lstm": {
        "learning_rate": Range(low=3e-4, high=1e-2, log=True),
        "batch_size": Range(choices=[32, 64, 128]),
        "embedding": Range(choices=[32, 64, 128]),
        "hidden": Range(choices=[32, 64, 128]),
        "layers": Range(low=1, high=3),
        "dropout": Range(low=0.0, high=0.6),
        "clip_norm": Range(choices=[0.0, 1.0]),
    },
    "encoder": {
        "learning_rate": Range(low=1e-5, high=3e-4, log=True),
        "batch_size": Range(choices=[16, 32, 64]),
        "schedule": Range(choices=["constant", "linear", "cosine"]),
        "warmup": Range(low=0.0, high=0.2),
        "dropout": Range(low=0.0, high=0.4),
    },
}
"""What is varied of each model where a recipe does not say; a model without an entry needs `[tune.space]`."""


def space_of(recipe: Recipe) -> dict[str, Range]:
    """Return what a search by this recipe varies, every value of it checked.

    Where the recipe names no space, it is the model's, less what the recipe sets.

    Raises:
        DataError: a name is not known, a range is empty, or a value is none that the option may have.
    """
    architecture = recipe.model.architecture
    space = (recipe.tune or TuneTable()).space
    if not space:
        fixed = {name for name, value in msgspec.structs.asdict(recipe.training).items() if value is not None}
        fixed |= recipe.model.options.keys()
        space = {name: values for name, values in SPACES.get(architecture, {}).items() if name not in fixed}
    if not space:
        raise DataError(
            f"there is nothing to vary: {architecture} has no space of its own, or the recipe sets all of it. Say what "
            "to vary in the recipe, [tune.space]."
        )
    for name, values in space.items():
        _check(recipe, name, values)
    return space


def fitting(recipe: Recipe, space: dict[str, Range], rows: int) -> dict[str, Range]:
    """Return the space for so many training rows: with few, a batch is as large as they allow, not varied."""
    if (recipe.tune or TuneTable()).space or "batch_size" not in space:
        return space
    largest = max(size for size in space["batch_size"].ends if isinstance(size, int))
    if largest * MIN_STEPS <= rows:
        return space
    return {name: values for name, values in space.items() if name != "batch_size"}


def _check(recipe: Recipe, name: str, values: Range) -> None:
    where = f"[tune.space] {name}"
    known = _kinds(recipe.model.architecture)
    if name in NOT_VARIED:
        raise DataError(f"{where} cannot be varied: {NOT_VARIED[name]}.")
    if name not in known:
        raise DataError(
            f"{where}: {recipe.model.architecture} has no such option, nor has training. There are: "
            f"{', '.join(sorted(known.keys() - NOT_VARIED.keys()))}."
        )
    if values.choices is not None:
        if values.low is not None or values.high is not None or values.log:
            raise DataError(f"{where}: give either `choices`, or `low` and `high`, not both.")
        if len({(type(value), value) for value in values.choices}) < len(values.choices):
            raise DataError(f"{where}: a choice stands there twice.")
    else:
        low, high = values.low, values.high
        if low is None or high is None:
            raise DataError(f"{where}: give `low` and `high`, or `choices`.")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise DataError(f"{where}: the range from {low:g} to {high:g} is empty: `low` must be less than `high`.")
        if values.log and low <= 0:
            raise DataError(f"{where}: with `log`, `low` must be above 0.")
        if known[name] not in (int, float):
            raise DataError(f"{where} is no number: give `choices`.")
    for value in values.ends:
        try:
            applied(recipe, {name: value})
        except (ModelError, DataError) as error:
            raise DataError(f"{where} cannot be {value!r}: {error}") from error


def _kinds(architecture: str) -> dict[str, type]:
    """Return int, float or object (anything else) for each option that training or the model has."""
    kinds: dict[str, type] = {}
    for struct in (TrainOptions, MODELS[architecture][1]):
        info = inspect.type_info(struct)
        assert isinstance(info, inspect.StructType)
        for field in info.fields:
            types = field.type.types if isinstance(field.type, inspect.UnionType) else (field.type,)
            if any(isinstance(one, inspect.FloatType) for one in types):
                kinds[field.name] = float
            else:
                kinds[field.name] = int if any(isinstance(one, inspect.IntType) for one in types) else object
    return kinds


def applied(recipe: Recipe, parameters: Mapping[str, Value]) -> Recipe:
    """Return the recipe with the values of a trial in it.

    Raises:
        DataError: an option of training may not have such a value.
        ModelError: nor one of the model.
    """
    of_training = {name for name in parameters if name in TrainOptions.__struct_fields__}
    training = msgspec.to_builtins(recipe.training) | {name: parameters[name] for name in of_training}
    options = recipe.model.options | {name: value for name, value in parameters.items() if name not in of_training}
    try:
        how = msgspec.convert(training, TrainOptions)
    except msgspec.ValidationError as error:
        raise DataError(f"{error}.") from error
    options_of(recipe.model.architecture, options)
    model = msgspec.structs.replace(recipe.model, options=options)
    return msgspec.structs.replace(recipe, training=how, model=model)


def impatient(recipe: Recipe) -> Recipe:
    """Return the recipe whose training ends once validation gets no better, unless it says itself when."""
    if recipe.training.patience is not None:
        return recipe
    return msgspec.structs.replace(recipe, training=msgspec.structs.replace(recipe.training, patience=PATIENCE))


def start_of(recipe: Recipe, space: Mapping[str, Range], rows: int) -> Parameters | None:
    """Return what the recipe itself has for each name, for so many training rows; None if the space lacks a value."""
    known = msgspec.to_builtins(complete(recipe.training, recipe.model.architecture, rows))
    known |= msgspec.to_builtins(options_of(recipe.model.architecture, recipe.model.options))
    found = {name: known[name] for name in space}
    return found if all(space[name].admits(value) for name, value in found.items()) else None


def distributions(architecture: str, space: Mapping[str, Range]) -> dict[str, BaseDistribution]:
    """Return the space as Optuna knows it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    kinds = _kinds(architecture)
    found: dict[str, BaseDistribution] = {}
    for name, values in space.items():
        if values.choices is not None:
            found[name] = CategoricalDistribution(values.choices)
        elif kinds[name] is int:
            found[name] = IntDistribution(int(values.low or 0), int(values.high or 0), log=values.log)
        else:
            found[name] = FloatDistribution(float(values.low or 0), float(values.high or 0), log=values.log)
    return found
