"""What the search of `millpond learn tune` is worth: beside random search at the same number of epochs, over 5 seeds.

Three ways to spend the same epochs on the same rows of IMDB's training split: the search (its own sampler, space and
ASHA), random search, which trains each trial to its end, and random search with ASHA, to tell what the sampler adds.
One trial at a time in this process (without Ray, which changes no value); none begins with the defaults. Random search
then goes on, to see what it needs to come as far. The test split is not read. Models may be named:

    python benchmarks/bench_tune.py ngram seqcnn

Writes benchmarks/results/tune.json, the models that ran; others stay as they were.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import optuna
import torch
from ray.tune.schedulers import ASHAScheduler

from millpond.learn.datasets import Dataset, Split
from millpond.learn.fit import Encode, Stopwatch, fit
from millpond.learn.options import TrainingError
from millpond.learn.progress import Epoch
from millpond.learn.recipes import DataTable, Recipe, hold_back, load_data, read_recipe, used_rows
from millpond.learn.tune.encodings import shared_encodings
from millpond.learn.tune.search import FAILED, sampler_of
from millpond.learn.tune.space import applied, distributions, impatient, space_of
from millpond.settings import LearnSettings, load

RESULT = Path(__file__).parent / "results/tune.json"
SEEDS = range(5)
ROWS = 1600
BUDGET, EPOCHS = 100, 9
"""Epochs of a search, and of a trial at most."""
MOST_BUDGETS = 2
"""Random search goes on for so many budgets at most."""
WAYS = {"tune": ("tpe", True), "random with ASHA": ("random", True), "random": ("random", False)}
"""What chooses values, and whether ASHA ends trials."""
CPU = torch.device("cpu")
RECIPES: dict[str, dict[str, Any]] = {
    "ngram": {
        "model": {"architecture": "ngram", "options": {"buckets": 2**14, "max_words": 150}},
        "tune": {
            "space": {
                "learning_rate": {"low": 1e-4, "high": 0.3, "log": True},
                "batch_size": {"choices": [16, 32, 64, 128]},
                "smoothing": {"low": 0.1, "high": 100.0, "log": True},
                "start": {"low": 1e-4, "high": 0.3, "log": True},
                "max_ngram": {"choices": [1, 2, 3]},
                "min_count": {"choices": [1, 2, 3]},
            }
        },
    },
    "seqcnn": {
        "model": {"architecture": "seqcnn", "options": {"embedding": 8, "max_words": 64, "last_words": 16}},
        "tune": {
            "space": {
                "learning_rate": {"low": 1e-4, "high": 0.1, "log": True},
                "batch_size": {"choices": [16, 32, 64]},
                "filters": {"choices": [4, 8, 16]},
                "dropout": {"low": 0.0, "high": 0.8},
                "embedding_dropout": {"low": 0.0, "high": 0.8},
                "min_count": {"choices": [2, 5, 10, 20]},
            }
        },
    },
}
"""Small enough for one core; half of the rows used are learned from, half are measured on."""


class _Stopped(BaseException):
    """ASHA has seen enough of a trial."""


def search(
    way: str, recipe: Recipe, data: Dataset, learned: Split, encode: Encode, seed: int, reach: float
) -> list[float]:
    """Return the lowest validation loss so far after each epoch of a search without Ray.

    Random search ends where it has come as far as `reach` says, the others with the budget.
    """
    table = recipe.tune
    assert table is not None
    sampler, with_asha = WAYS[way]
    study = optuna.create_study(sampler=sampler_of(msgspec.structs.replace(table, search=sampler), seed))
    asha = ASHAScheduler(time_attr="epoch", metric="loss", mode="min", max_t=EPOCHS, reduction_factor=table.reduction)
    space = distributions(recipe.model.architecture, space_of(recipe))
    curve: list[float] = []
    while len(curve) < BUDGET or (curve[-1] > reach and len(curve) < MOST_BUDGETS * BUDGET):
        trial = study.ask(fixed_distributions=space)
        known: Any = SimpleNamespace(trial_id=str(trial.number))
        asha.on_trial_add(None, known)
        losses: list[float] = []

        def on_epoch(epoch: Epoch, losses: list[float] = losses, known: Any = known) -> None:
            losses.append(epoch.validation_loss or 0.0)
            curve.append(min([*curve[-1:], losses[-1]]))
            decision = asha.on_trial_result(None, known, {"epoch": epoch.epoch, "loss": min(losses)})
            if with_asha and decision == "STOP":
                raise _Stopped

        tried = applied(recipe, trial.params)
        with contextlib.suppress(_Stopped, TrainingError):
            fit(tried, data, learned, CPU, lambda at: None, Stopwatch(), on_epoch=on_epoch, encode=encode)
        study.tell(trial, min(losses, default=FAILED))
    return curve


def compare(name: str, seed: int, data: Dataset) -> dict[str, Any]:
    """Search by all ways, on the same rows; return where each was when the budget was used up."""
    given = RECIPES[name] | {"data": {"corpus": "imdb"}, "seed": seed, "train_rows": ROWS}
    recipe = impatient(read_recipe(None, given | {"training": {"epochs": EPOCHS}}))
    learned, held = hold_back(msgspec.structs.replace(recipe, validation=0.5), data, used_rows(recipe, data)[0])
    curves: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as shared:
        how = (recipe, replace(data, validation=held), learned, partial(shared_encodings, Path(shared)), seed)
        for way in WAYS:
            reach = curves["tune"][BUDGET - 1] if way == "random" else math.inf
            curves[way] = search(way, *how, reach)
    loss = {way: curve[BUDGET - 1] for way, curve in curves.items()}
    reached = {
        way: next((count for count, value in enumerate(curves[way], 1) if value <= loss["tune"]), None) for way in WAYS
    }
    return {
        "seed": seed,
        "loss": {way: round(value, 5) for way, value in loss.items()},
        "epochs_to_what_tune_reached": reached,
        "epochs_tried": {way: len(curve) for way, curve in curves.items()},
        "curves": {way: [round(value, 4) for value in curve] for way, curve in curves.items()},
    }


def summed_up(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the seeds together say: the search beside each other way; `t` is that of the paired differences."""
    found: dict[str, Any] = {
        "rows": {"learned_from": ROWS // 2, "measured_on": ROWS // 2},
        "epochs_of_a_search": BUDGET,
        "most_epochs_of_a_trial": EPOCHS,
        "seeds": len(runs),
        "mean_loss": {way: round(statistics.mean(run["loss"][way] for run in runs), 5) for way in WAYS},
    }
    for way in list(WAYS)[1:]:
        differences = [run["loss"]["tune"] - run["loss"][way] for run in runs]
        spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
        mean = statistics.mean(differences)
        found[f"tune against {way}"] = {
            "ratio": round(found["mean_loss"]["tune"] / found["mean_loss"][way], 4),
            "mean_difference": round(mean, 5),
            "t": round(mean / (spread / len(differences) ** 0.5), 2) if spread else None,
            "seeds_won": sum(difference < 0 for difference in differences),
        }
    return found | {"runs": runs}


def main() -> None:
    """Run the models named, or all, and write what they came to."""
    chosen = sys.argv[1:] or list(RECIPES)
    if unknown := set(chosen) - set(RECIPES):
        sys.exit(f"no model {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    settings = load(LearnSettings)
    data = load_data(Recipe(data=DataTable(corpus="imdb")), settings)
    data = replace(data, validation=None)
    for name in chosen:
        print(f"{name}:", flush=True)
        began, runs = time.process_time(), []
        for seed in SEEDS:
            runs.append(compare(name, seed, data))
            shown = ", ".join(f"{way} {loss:.4f}" for way, loss in runs[-1]["loss"].items())
            needed = runs[-1]["epochs_to_what_tune_reached"]["random"] or f"more than {MOST_BUDGETS * BUDGET}"
            print(f"  seed {seed}, after {BUDGET} epochs: {shown}; random comes as far in {needed}", flush=True)
            used = {"cpu_s": round(time.process_time() - began, 1)}
            command = {"command": f"python benchmarks/bench_tune.py {name}"}
            result[name] = command | _circumstances() | used | summed_up(runs)
            RESULT.write_text(json.dumps(result, indent=2) + "\n")
        for way in list(WAYS)[1:]:
            against = result[name][f"tune against {way}"]
            print(
                f"  tune against {way}, mean of {len(runs)} seeds: ratio {against['ratio']}, difference "
                f"{against['mean_difference']} (t = {against['t']}), better in {against['seeds_won']}",
                flush=True,
            )
    print(f"written to {RESULT}")


def _circumstances() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    names = ("millpond", "torch", "numpy", "ray", "optuna")
    return {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
    }


if __name__ == "__main__":
    main()
