"""Recipes: what is misspelt is refused, paths are relative to the file, rows are chosen by the seed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millpond import MillpondError
from millpond.learn.datasets import DataError, Dataset
from millpond.learn.models import MODELS
from millpond.learn.options import TrainOptions
from millpond.learn.recipes import (
    DataTable,
    DistilTable,
    ModelTable,
    Recipe,
    hold_back,
    load_data,
    read_recipe,
    used_rows,
)
from millpond.learn.train import DEFAULTS, complete
from millpond.settings import LearnSettings

WHOLE = """
seed = 7
train_rows = 100
validation = 0.1
correction_weight = 2

[data]
file = "reviews.csv"
test_file = "sub/test.csv"
text = "body"
label = "stars"

[model]
architecture = "seqcnn"
[model.options]
embedding = 64

[training]
epochs = 2
batch_size = 16
learning_rate = 0.001
"""


def write(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    return path


def test_every_key_is_read_and_files_are_relative_to_the_recipe(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, WHOLE))
    assert (recipe.seed, recipe.train_rows, recipe.validation, recipe.correction_weight) == (7, 100, 0.1, 2)
    assert recipe.data.file == str(tmp_path / "reviews.csv")
    assert recipe.data.test_file == str(tmp_path / "sub/test.csv")
    assert (recipe.data.text, recipe.data.label) == ("body", "stars")
    assert recipe.model.options == {"embedding": 64}
    assert (recipe.training.epochs, recipe.training.batch_size, recipe.training.learning_rate) == (2, 16, 0.001)


def test_the_command_line_changes_only_what_it_says(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"seed": 1, "train_rows": None, "training": {"epochs": 9, "batch_size": None}}
    recipe = read_recipe(write(tmp_path, WHOLE), changes)
    assert (recipe.seed, recipe.train_rows) == (1, 100)
    assert (recipe.training.epochs, recipe.training.batch_size) == (9, 16)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[data]\ncorpus = 'imdb'\nspit = 'x'", "spit"),
        ("sed = 1\n[data]\ncorpus = 'imdb'", "sed"),
        ("", "exactly one of"),
        ("[data]\ncorpus = 'imdb'\nfile = 'a.csv'", "exactly one of"),
        ("[data]\ncorpus = 'imdb'\nsplit = 'part'", "go with `file`"),
        ("data = 'imdb'", "Expected `object`"),
        ("seed = 'one'\n[data]\ncorpus = 'imdb'", "seed"),
        ("train_rows = 1\n[data]\ncorpus = 'imdb'", "train_rows"),
        ("validation = 0.9\n[data]\ncorpus = 'imdb'", "validation"),
        ("[data", "is not TOML"),
        ("[data]\ncorpus = 'imdb'\n[model]\narchitecture = 'bert'", "no model 'bert'"),
        ("[data]\ncorpus = 'imdb'\n[model.options]\nbucket = 1", "bucket"),
        ("[data]\ncorpus = 'imdb'\n[training]\nepochs = -1", "epochs"),
        ("#" * 70_000, "larger than"),
    ],
)
def test_a_wrong_recipe_is_refused_before_any_work(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(MillpondError, match=says):
        read_recipe(write(tmp_path, content))


def test_a_missing_or_binary_recipe_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not TOML"):
        read_recipe(tmp_path / "recipe.toml")


def test_used_and_rest_are_all_training_rows_in_a_seeded_order(small: Dataset) -> None:
    recipe = Recipe(data=DataTable(corpus="small"), train_rows=150, seed=4)
    used, rest = used_rows(recipe, small)
    again, _ = used_rows(recipe, small)
    other, _ = used_rows(Recipe(data=DataTable(corpus="small"), train_rows=150, seed=5), small)
    assert (len(used), len(rest)) == (150, 250)
    assert sorted([*used.texts, *rest.texts]) == sorted(small.train.texts)
    assert used.texts == again.texts != other.texts


def test_validation_comes_out_of_the_rows_used_and_never_out_of_the_test(small: Dataset) -> None:
    recipe = Recipe(data=DataTable(corpus="small"), validation=0.1)
    learned, held = hold_back(recipe, small, small.train)
    assert held is not None
    assert (len(learned), len(held)) == (360, 40)
    assert not set(held.texts) & set(learned.texts)
    assert not set(held.texts) & set(small.test.texts)
    assert hold_back(Recipe(data=DataTable(corpus="small"), validation=0.0), small, small.train)[1] is None


def test_a_recipe_s_file_is_loaded_with_its_columns(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("body,stars\n" + "".join(f"text {i},{i % 2}\n" for i in range(20)))
    recipe = read_recipe(write(tmp_path, "[data]\nfile = 'r.csv'\ntext = 'body'\nlabel = 'stars'"))
    dataset = load_data(recipe, LearnSettings(home=tmp_path))
    assert (dataset.name, len(dataset.train), len(dataset.test)) == ("r", 16, 4)


PAGE = Path(__file__).parents[2] / "docs/reference/recipe.md"


def test_every_key_and_default_is_on_the_page() -> None:
    page = PAGE.read_text()
    structs = (Recipe, DataTable, ModelTable, DistilTable, TrainOptions)
    missing = [key for struct in structs for key in struct.__struct_fields__ if not re.search(rf"\b{key}\b", page)]
    assert not missing
    for architecture, (_, kind) in MODELS.items():
        table = page.partition(f"| `{architecture}` | default")[2].partition("\n\n")[0]
        rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.M))
        for field in msgspec.structs.fields(kind):
            if field.name == "max_vocabulary":  # common to all, in the text above the tables
                continue
            said = {"must be given": msgspec.NODEFAULT, "from `pretrained`": "", "true": True}.get(rows[field.name])
            assert (float(rows[field.name]) if said is None else said) == field.default, f"{architecture}: {field.name}"
    head, _, *lines = page.partition("| training |")[2].splitlines()
    columns = re.findall(r"`(\w+)`", head)
    training = {cells[1].strip(" `"): cells[2:] for cells in (line.split("|") for line in lines) if len(cells) > 2}
    assert columns == list(DEFAULTS)
    for key in TrainOptions.__struct_fields__:
        for architecture, cell in zip(columns, training[key], strict=False):
            value = getattr(complete(TrainOptions(), architecture, 10**6), key)
            shown = f"{value:g}" if isinstance(value, float) else "auto" if value is None else str(value).lower()
            assert cell.strip() == shown, f"{architecture}: {key}"


def test_the_recipe_on_the_page_is_one(tmp_path: Path) -> None:
    block = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    recipe = read_recipe(write(tmp_path, block))
    assert recipe == Recipe(
        data=DataTable(corpus="imdb"),
        model=ModelTable(options={"buckets": 2**21}),
        training=complete(TrainOptions(), "ngram", 10**6),
        train_rows=10_000,
    )
    whole = re.sub(
        r"^corpus = .*\n", "", block.replace("# file", "file").replace("# test_file", "test_file"), flags=re.M
    )
    whole = re.sub(
        r"^# (\[distil\]|(text|label|split|teacher|temperature|weight|unlabelled\w*) = )", r"\1", whole, flags=re.M
    )
    recipe = read_recipe(write(tmp_path, whole))
    assert recipe.data.split == "split"
    assert recipe.distil is not None
    assert recipe.distil.unlabelled_rows == 20_000
    assert (recipe.distil.temperature, recipe.distil.weight) == (2.0, 0.5)  # the defaults
