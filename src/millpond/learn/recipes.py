"""Recipes: a TOML file that says what a model is trained on and how, so that a job can repeat what a person did."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from millpond.learn import corpora
from millpond.learn.datasets import DataError, Dataset, Split, read_files, shuffled, split_texts
from millpond.learn.models import options_of
from millpond.learn.train import TrainOptions
from millpond.settings import LearnSettings

MAX_RECIPE_BYTES = 64 * 1024


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A misspelt key is an error, not a default."""


class DataTable(_Table, frozen=True, kw_only=True):
    """`[data]`: a named corpus, or a file with its columns (and maybe a second file to test on)."""

    corpus: str | None = None
    file: str | None = None
    test_file: str | None = None
    text: str = "text"
    label: str = "label"
    split: str | None = None


class ModelTable(_Table, frozen=True, kw_only=True):
    """`[model]`: the architecture; `[model.options]`: its options."""

    architecture: str = "ngram"
    options: dict[str, Any] = {}


class DistilTable(_Table, frozen=True, kw_only=True):
    """`[distil]`: a trained model that teaches the one to be trained, on texts without labels too."""

    teacher: str
    """A run, or a model directory."""
    unlabelled: str | None = None
    """A file of texts; those that are in the test or validation split are left out."""
    text: str = "text"
    """Its column with the text."""
    unlabelled_rows: Annotated[int, Meta(ge=0)] | None = None
    """How many of its first rows are read; None: all."""
    temperature: Annotated[float, Meta(ge=0.1, le=100)] = 2.0
    """What the teacher's and the student's logits are divided by: above 1, its small doubts are learned too."""
    weight: Annotated[float, Meta(ge=0, le=1)] = 0.5
    """Of the teacher against the label, where there is one."""


class Recipe(_Table, frozen=True, kw_only=True):
    """The whole file; every key has a default but `[data]`."""

    data: DataTable
    model: ModelTable = ModelTable()
    training: TrainOptions = TrainOptions()
    distil: DistilTable | None = None
    seed: int = 0
    train_rows: Annotated[int, Meta(ge=2)] | None = None
    """How many rows of the training split are used, first in a seeded order; None: all. The others are untouched."""
    validation: Annotated[float, Meta(ge=0, le=0.5)] = 0.05
    """Share of the rows used that is held back to choose the best epoch."""
    correction_weight: Annotated[int, Meta(ge=1, le=100)] = 1
    """How often each correction is repeated among the training rows."""


def read_recipe(path: Path | None, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe, its file names relative to it, and lay `changes` over it; what is None in them changes nothing.

    Raises:
        DataError: it cannot be read, is no TOML, or has a key or value that is not known.
        ModelError: the model or its options are not known.
    """
    raw = {} if path is None else _read_toml(path)
    if path is not None:
        _place(raw, path.resolve().parent)
    try:
        recipe = msgspec.convert(_overlay({"data": {}} | raw, changes or {}), Recipe)
    except msgspec.ValidationError as error:
        where = f"recipe {path}" if path else "the recipe"
        raise DataError(f"{where}: {error}. See docs/how-to/train-on-your-own-text.md.") from error
    check(recipe)
    return recipe


def _place(raw: dict[str, Any], directory: Path) -> None:
    """Have the files and directories that a recipe names lie relative to its own directory."""
    for table, keys in (("data", ("file", "test_file")), ("distil", ("teacher", "unlabelled"))):
        if not isinstance(named := raw.get(table), dict):
            continue
        for key in keys:
            if isinstance(named.get(key), str):
                named[key] = str(directory / named[key])
    model = raw.get("model")
    options = model.get("options") if isinstance(model, dict) else None
    pretrained = options.get("pretrained") if isinstance(options, dict) else None
    if isinstance(options, dict) and isinstance(pretrained, str) and (directory / pretrained).is_dir():
        options["pretrained"] = str(directory / pretrained)  # else it is a name


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_RECIPE_BYTES + 1)
        if len(raw) > MAX_RECIPE_BYTES:
            raise DataError(f"recipe {path} is larger than {MAX_RECIPE_BYTES} bytes.")
        return tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        raise DataError(f"recipe {path} cannot be read: {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"recipe {path} is not TOML: {error}.") from error


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `below` with what `above` sets."""
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping):
            under = result.get(key)
            result[key] = _overlay(under if isinstance(under, Mapping) else {}, value)
        elif value is not None:
            result[key] = value
    return result


def check(recipe: Recipe) -> None:
    """Refuse a recipe that cannot be followed, before any work is done.

    Raises:
        DataError: it names both a corpus and a file, or neither.
        ModelError: the model or its options are not known.
    """
    data = recipe.data
    if (data.corpus is None) == (data.file is None):
        raise DataError("a recipe's [data] names either a corpus or a file: set exactly one of `corpus` and `file`.")
    if data.corpus is not None and (data.test_file or data.split):
        raise DataError("a corpus has its own splits: `test_file` and `split` go with `file`.")
    options_of(recipe.model.architecture, recipe.model.options)


def load_data(recipe: Recipe, settings: LearnSettings) -> Dataset:
    """Return the recipe's dataset, fetched if it is not here yet."""
    data = recipe.data
    if data.corpus is not None:
        return corpora.load(data.corpus, settings)
    assert data.file is not None  # check() has seen to it
    path = Path(data.file)
    test = Path(data.test_file) if data.test_file else None
    return read_files(path.stem, path, test, text=data.text, label=data.label, split=data.split, seed=recipe.seed)


def used_rows(recipe: Recipe, dataset: Dataset) -> tuple[Split, Split]:
    """Divide the training split into the rows that the recipe trains on and the rest, both in the seeded order."""
    order = shuffled(dataset.train, recipe.seed)
    count = len(order) if recipe.train_rows is None else min(recipe.train_rows, len(order))
    return dataset.train.take(order[:count]), dataset.train.take(order[count:])


def hold_back(recipe: Recipe, dataset: Dataset, used: Split) -> tuple[Split, Split | None]:
    """Return the rows to learn from and those to choose the best epoch on (None: there are none)."""
    if dataset.validation is not None:
        return used, dataset.validation
    keep, held = split_texts(used, recipe.validation, recipe.seed)
    return used.take(keep), used.take(held) if len(held) else None
