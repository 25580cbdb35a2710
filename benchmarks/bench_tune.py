"""What the search of `millpond learn tune` is worth: beside random search at the same number of epochs, over 5 seeds.

Both are the search's own sampler, space and ASHA on the same rows of IMDB's training split, one trial at a time in this
process (without Ray, which changes no value); only where a trial's values come from differs, and neither begins with
the defaults. They are compared where the first of them has used up its epochs. The test split is not read.
Models may be named:

    python benchmarks/bench_tune.py ngram seqcnn

Writes benchmarks/results/tune.json, the models that ran; others stay as they were.
"""

from __future__ import annotations

import contextlib
import datetime
import json
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
ROWS, TRIALS, EPOCHS = 1600, 50, 9
WAYS = ("tpe", "random")
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


def search(way: str, recipe: Recipe, data: Dataset, learned: Split, encode: Encode, seed: int) -> list[float]:
    """Return the lowest validation loss so far after each epoch of a search: its sampler and ASHA, without Ray."""
    table = recipe.tune
    assert table is not None
    study = optuna.create_study(sampler=sampler_of(msgspec.structs.replace(table, search=way), seed))
    asha = ASHAScheduler(time_attr="epoch", metric="loss", mode="min", max_t=EPOCHS, reduction_factor=table.reduction)
    space = distributions(recipe.model.architecture, space_of(recipe))
    curve: list[float] = []
    for number in range(TRIALS):
        trial = study.ask(fixed_distributions=space)
        known: Any = SimpleNamespace(trial_id=str(number))
        asha.on_trial_add(None, known)
        losses: list[float] = []

        def on_epoch(epoch: Epoch, losses: list[float] = losses, known: Any = known) -> None:
            losses.append(epoch.validation_loss or 0.0)
            curve.append(min([*curve[-1:], losses[-1]]))
            if asha.on_trial_result(None, known, {"epoch": epoch.epoch, "loss": min(losses)}) == "STOP":
                raise _Stopped

        tried = applied(recipe, trial.params)
        with contextlib.suppress(_Stopped, TrainingError):
            fit(tried, data, learned, CPU, lambda at: None, Stopwatch(), on_epoch=on_epoch, encode=encode)
        study.tell(trial, min(losses, default=FAILED))
    return curve


def compare(name: str, seed: int, data: Dataset) -> dict[str, Any]:
    """Search by both ways, on the same rows; return where each was when the first of them had used up its epochs."""
    given = RECIPES[name] | {"data": {"corpus": "imdb"}, "seed": seed, "train_rows": ROWS}
    recipe = impatient(read_recipe(None, given | {"training": {"epochs": EPOCHS}}))
    learned, held = hold_back(msgspec.structs.replace(recipe, validation=0.5), data, used_rows(recipe, data)[0])
    with tempfile.TemporaryDirectory() as shared:
        how = (recipe, replace(data, validation=held), learned, partial(shared_encodings, Path(shared)), seed)
        curves = {way: search(way, *how) for way in (WAYS if seed % 2 == 0 else WAYS[::-1])}
    epochs = min(map(len, curves.values()))
    loss = {way: curves[way][epochs - 1] for way in WAYS}
    as_good = next((count for count, value in enumerate(curves["tpe"], 1) if value <= loss["random"]), None)
    return {
        "seed": seed,
        "epochs": epochs,
        "loss": {way: round(value, 5) for way, value in loss.items()},
        "difference": round(loss["tpe"] - loss["random"], 5),
        "loss_after_all_trials": {way: round(curves[way][-1], 5) for way in WAYS},
        "epochs_of_all_trials": {way: len(curves[way]) for way in WAYS},
        "epochs_of_tpe_to_what_random_reached": as_good,
        "curves": {way: [round(value, 4) for value in curves[way]] for way in WAYS},
    }


def summed_up(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the seeds together say; `t` is that of the paired differences."""
    differences = [run["difference"] for run in runs]
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    mean = {way: statistics.mean(run["loss"][way] for run in runs) for way in WAYS}
    found = {
        "rows": {"learned_from": ROWS // 2, "measured_on": ROWS // 2},
        "trials": TRIALS,
        "most_epochs_of_a_trial": EPOCHS,
        "mean_loss": {way: round(value, 5) for way, value in mean.items()},
        "mean_difference": round(statistics.mean(differences), 5),
        "t": round(statistics.mean(differences) / (spread / len(differences) ** 0.5), 2) if spread else None,
        "ratio": round(mean["tpe"] / mean["random"], 4),
        "seeds_won": sum(difference < 0 for difference in differences),
        "seeds": len(runs),
        "runs": runs,
    }
    return found


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
            print(f"  seed {seed}, after {runs[-1]['epochs']} epochs: {shown}", flush=True)
            used = {"cpu_s": round(time.process_time() - began, 1)}
            command = {"command": f"python benchmarks/bench_tune.py {name}"}
            result[name] = command | _circumstances() | used | summed_up(runs)
            RESULT.write_text(json.dumps(result, indent=2) + "\n")
        found = result[name]
        print(
            f"  mean of {found['seeds']} seeds at equal epochs: tpe {found['mean_loss']['tpe']:.4f}, random "
            f"{found['mean_loss']['random']:.4f}, ratio {found['ratio']}, difference {found['mean_difference']} "
            f"(t = {found['t']}), better in {found['seeds_won']}",
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
