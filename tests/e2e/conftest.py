"""A corpus small enough to train in seconds, hard enough that a model makes mistakes and learns from corrections."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest

from millpond.demo.corpus import DemoCorpus, share_out

GOOD = ["warm", "clever", "moving", "bright", "tender", "funny", "bold", "rich", "honest", "graceful"]
BAD = ["dull", "clumsy", "flat", "noisy", "cold", "lazy", "stale", "hollow", "bitter", "messy"]
PLAIN = [f"word{number}" for number in range(200)]
RECIPE = """\
train_rows = 300
seed = 1

[data]
file = "train.csv"
test_file = "test.csv"

[model.options]
buckets = 4096
"""


def _write_rows(path: Path, count: int, dice: random.Random) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(count):
            label, words = dice.choice([("good", GOOD), ("bad", BAD)])
            told = dice.choices(words, k=2) + dice.choices(GOOD + BAD, k=1)
            text = dice.choices(PLAIN, k=6) + told
            dice.shuffle(text)
            writer.writerow([f"{' '.join(text)} no{number}", label])


@pytest.fixture
def small_corpus(tmp_path: Path) -> DemoCorpus:
    dice = random.Random(5)
    _write_rows(tmp_path / "train.csv", 1500, dice)
    _write_rows(tmp_path / "test.csv", 2500, dice)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    return share_out(recipe, name="small", why="made by the test")
