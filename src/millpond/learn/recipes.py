"""Recipes: a TOML file that says what a model is trained on and how, so that a job can repeat what a person did."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, get_args

import msgspec
from msgspec import Meta

from millpond.learn import corpora
from millpond.learn.datasets import DataError, Dataset, Split, shuffled, split_texts
from millpond.learn.gather import OnRows, read_files, read_query
from millpond.learn.models import options_of
from millpond.learn.options import TrainOptions
from millpond.learn.paddle.messages import Architecture
from millpond.learn.prepared import PreparedSets
from millpond.learn.sources import is_url, shown
from millpond.learn.tune.space import TuneTable
from millpond.settings import LearnSettings

MAX_RECIPE_BYTES = 64 * 1024


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A misspelt key is an error, not a default."""


class DataTable(_Table, frozen=True, kw_only=True):
    """`[data]`: a named corpus, a file or directory (and maybe a second one to test on), or a query."""

    corpus: str | None = None
    file: str | None = None
    """A path or URL."""
    test_file: str | None = None
    query: str | None = None
    database: str | None = None
    """SQLAlchemy URL for `query`; None: MILLPOND_LEARN_DATABASE."""
    text: str = "text"
    label: str = "label"
    split: str | None = None
    drop_leaks: bool = False
    """Leave out training rows whose text is in the test split."""

    @property
    def source(self) -> str:
        """Return what is read, for people, without credentials."""
        return self.corpus or (shown(self.file) if self.file else "the rows of a query")


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
    tune: TuneTable | None = None
    """How `millpond learn tune` searches; training does not look at it."""
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
        _place(raw, path)
    try:
        recipe = msgspec.convert(_overlay({"data": {}} | raw, changes or {}), Recipe)
    except msgspec.ValidationError as error:
        where = f"recipe {path}" if path else "the recipe"
        raise DataError(f"{where}: {error}. See docs/how-to/train-on-your-own-text.md.") from error
    check(recipe)
    return recipe


def _place(raw: dict[str, Any], path: Path) -> None:
    """Have the sources and directories that a recipe names lie relative to its own directory."""
    for table, keys in (("data", ("file", "test_file", "database")), ("distil", ("teacher", "unlabelled"))):
        if not isinstance(named := raw.get(table), dict):
            continue
        for key in keys:
            if isinstance(named.get(key), str):
                named[key] = _beside(path, named[key])
    directory = path.resolve().parent
    model = raw.get("model")
    options = model.get("options") if isinstance(model, dict) else None
    pretrained = options.get("pretrained") if isinstance(options, dict) else None
    if isinstance(options, dict) and isinstance(pretrained, str) and (directory / pretrained).is_dir():
        options["pretrained"] = str(directory / pretrained)  # else it is a name


def _beside(recipe: Path, source: str) -> str:
    """Return a path (or SQLite's URL of one) relative to the recipe's directory, any other URL as it is."""
    file = source.removeprefix("sqlite:///")
    if file != source and file and not file.startswith("file:") and file != ":memory:":
        return f"sqlite:///{recipe.resolve().parent / file}"
    return source if is_url(source) else str(recipe.resolve().parent / source)


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
    if [data.corpus, data.file, data.query].count(None) != 2:
        raise DataError(
            "a recipe's [data] names a corpus, a file or a query: set exactly one of `corpus`, `file` and `query`."
        )
    if data.corpus is not None and (data.test_file or data.split):
        raise DataError("a corpus has its own splits: `test_file` and `split` go with `file`.")
    if data.query is None and data.database is not None:
        raise DataError("`database` goes with `query`.")
    if data.query is not None and data.test_file:
        raise DataError("`test_file` goes with `file`; rows of a query are split by the column that `split` names.")
    options_of(recipe.model.architecture, recipe.model.options)
    if recipe.training.framework == "paddle" and (cannot := _unknown_to_paddle(recipe)):
        raise DataError(f"Paddle cannot train {cannot}. Change that, or train in torch: --framework torch.")


def _unknown_to_paddle(recipe: Recipe) -> str:
    """Return the first thing that a recipe asks for and Paddle cannot do; empty: there is none."""
    model, can = recipe.model.architecture, get_args(Architecture)
    asked = {
        f"the model {model} (it can {' and '.join(can)})": model not in can,
        "with a teacher, whose answers are weighed in torch": recipe.distil is not None,
        "through torch.compile": bool(recipe.training.compile),
        "in float16, whose gradients must be scaled (it can bfloat16)": recipe.training.precision == "float16",
    }
    return next((what for what, is_asked in asked.items() if is_asked), "")


def shown_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe in plain values, without what is secret in a URL."""
    plain: dict[str, Any] = msgspec.to_builtins(recipe)
    data = plain["data"]
    for key in ("file", "test_file", "database"):
        data[key] = data[key] and shown(data[key])
    return plain


def load_data(recipe: Recipe, settings: LearnSettings, *, on_rows: OnRows = lambda count: None) -> Dataset:
    """Return the recipe's dataset, fetched if it is not here yet, and without leaks if it says so.

    Raises:
        DataError: it cannot be read or cannot train a model.
    """
    data = recipe.data
    how: dict[str, Any] = {"text": data.text, "label": data.label, "split": data.split, "seed": recipe.seed}
    how |= {"sets": PreparedSets.of(settings), "on_rows": on_rows}
    if data.corpus is not None:
        dataset = corpora.load(data.corpus, settings)
    elif data.query is not None:
        database = data.database or settings.database
        if not database:
            raise DataError(
                "a query needs a database: set `database` beside it to a SQLAlchemy URL, or MILLPOND_LEARN_DATABASE, "
                "or MILLPOND_LEARN_DATABASE_FILE to a file that holds it."
            )
        dataset = read_query("query", database, data.query, **how)
    else:
        assert data.file is not None  # check() has seen to it
        dataset = read_files(_name(data.file), data.file, data.test_file, **how)
    return dataset.without_leaks() if data.drop_leaks else dataset


def _name(source: str) -> str:
    """Return what a dataset is called after its file: `train` for train-*.csv, `reviews` for reviews/*.csv."""
    path = PurePath(shown(source))
    named = (re.sub(r"[*?\[\]]+", "", part).strip("-_. ") for part in (path.stem, path.parent.name))
    return next(filter(None, named), "data")


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
