"""What the search of `millpond learn tune` is worth: beside random search at the same number of epochs, over 5 seeds.

Claims: on `ngram` and a small `seqcnn` it finds a lower validation loss than random search does. Both are run by the
same code (Ray Tune, ASHA, one trial at a time) on the same rows of IMDB's training split in turn; only where the next
trial's values come from differs, and neither begins with the defaults. A search is cut where the other has used up
its epochs. The test split is not read. Models may be named:

    python benchmarks/bench_tune.py ngram seqcnn

Writes benchmarks/results/tune.json, the models that ran; others stay as they were.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from millpond.learn.local_ray import local_ray
from millpond.learn.recipes import DataTable, Recipe, hold_back, load_data, read_recipe, used_rows
from millpond.learn.tune.outcome import best_so_far
from millpond.learn.tune.record import FORMAT, NAME, Begun, Record, Trial
from millpond.learn.tune.space import distributions, space_of
from millpond.learn.tune.trial_process import Setup
from millpond.learn.tune.tuning import Budget, share
from millpond.settings import LearnSettings, load

RESULT = Path(__file__).parent / "results/tune.json"
SEEDS = range(5)
ROWS, TRIALS, EPOCHS = 3000, 30, 9
WAYS = ("tpe", "random")
RECIPES: dict[str, dict[str, Any]] = {
    "ngram": {
        "model": {"architecture": "ngram", "options": {"buckets": 2**16, "max_words": 200}},
        "tune": {
            "space": {
                "learning_rate": {"low": 1e-4, "high": 0.3, "log": True},
                "batch_size": {"choices": [64, 128, 256]},
                "smoothing": {"low": 0.1, "high": 100.0, "log": True},
                "start": {"low": 1e-4, "high": 0.3, "log": True},
                "max_ngram": {"choices": [1, 2, 3]},
                "min_count": {"choices": [1, 2, 3]},
            }
        },
    },
    "seqcnn": {
        "model": {"architecture": "seqcnn", "options": {"embedding": 16, "max_words": 64, "last_words": 16}},
        "tune": {
            "space": {
                "learning_rate": {"low": 1e-4, "high": 0.1, "log": True},
                "batch_size": {"choices": [16, 32, 64]},
                "filters": {"choices": [8, 16, 32]},
                "dropout": {"low": 0.0, "high": 0.8},
                "embedding_dropout": {"low": 0.0, "high": 0.8},
                "min_count": {"choices": [2, 5, 10, 20]},
            }
        },
    },
}
"""Small enough for one core; half of the rows used are learned from, half are measured on."""


def compare(name: str, seed: int, data: Any, scratch: Path) -> dict[str, Any]:
    """Search by both ways, on the same rows; return where each was when the first of them had used up its epochs."""
    from millpond.learn.tune.search import search

    given = RECIPES[name] | {"data": {"corpus": "imdb"}, "seed": seed, "train_rows": ROWS}
    recipe = read_recipe(None, given | {"training": {"epochs": EPOCHS}})
    table = recipe.tune
    assert table is not None
    space = space_of(recipe)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        learned, held = hold_back(msgspec.structs.replace(recipe, validation=0.5), data, used_rows(recipe, data)[0])
        assert held is not None
        share(directory, data, learned, held, "rows")
        setup = Setup(
            recipe=msgspec.to_builtins(msgspec.structs.replace(recipe, data=DataTable(file="rows"))),
            directory=temporary,
            rows="rows",
            device="cpu",
            threads=1,
            memory_share=None,
        )

        def run(way: str) -> list[Trial]:
            place = directory / way
            record = Record.create(place / NAME, Begun(format=FORMAT, search={}, data=""))
            search(
                record,
                distributions(name, space),
                msgspec.structs.replace(table, search=way),
                setup,
                Budget(trials=TRIALS, minutes=None),
                epochs=EPOCHS,
                seed=seed,
                start=None,
                prefix=(),
                scratch=scratch / f"{name}-{seed}-{way}",
            )
            record.close()
            return record.trials

        order = WAYS if seed % 2 == 0 else WAYS[::-1]
        trials = {way: run(way) for way in order}
    curves = {way: [lowest for _, _, lowest in best_so_far(trials[way], "loss")] for way in WAYS}
    epochs = min(map(len, curves.values()))
    found: dict[str, Any] = {"seed": seed, "epochs": epochs, "ways": {}}
    for way in WAYS:
        loss = curves[way][epochs - 1]
        best = next((trial, epoch) for trial in trials[way] for epoch in trial.epochs if epoch.loss == loss)
        found["ways"][way] = {
            "loss": loss,
            "accuracy": best[1].accuracy,
            "parameters": best[0].parameters,
            "epochs_run": len(curves[way]),
            "training_s": round(sum(epoch.seconds for trial in trials[way] for epoch in trial.epochs), 1),
            "failed": sum(trial.state == "failed" for trial in trials[way]),
            "curve": [round(value, 5) for value in curves[way]],
        }
    random_loss = found["ways"]["random"]["loss"]
    reached = next((count for count, value in enumerate(curves["tpe"], 1) if value <= random_loss), None)
    found["epochs_to_what_random_reached"] = reached
    found["difference"] = round(found["ways"]["tpe"]["loss"] - random_loss, 5)
    return found


def summed_up(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the seeds together say; `t` is that of the paired differences."""
    differences = [run["difference"] for run in runs]
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    mean = {way: statistics.mean(run["ways"][way]["loss"] for run in runs) for way in WAYS}
    found = {
        "rows": {"learned_from": ROWS // 2, "measured_on": ROWS // 2},
        "trials": TRIALS,
        "most_epochs_of_a_trial": EPOCHS,
        "mean_loss": {way: round(value, 5) for way, value in mean.items()},
        "mean_accuracy": {way: round(statistics.mean(run["ways"][way]["accuracy"] for run in runs), 5) for way in WAYS},
        "mean_difference": round(statistics.mean(differences), 5),
        "t": round(statistics.mean(differences) / (spread / len(differences) ** 0.5), 2) if spread else None,
        "ratio": round(mean["tpe"] / mean["random"], 4),
        "seeds_won": sum(difference < 0 for difference in differences),
        "seeds": len(runs),
        "runs": runs,
    }
    print(
        f"  {name}: best validation loss at equal epochs, mean of {len(runs)} seeds: tpe {mean['tpe']:.4f}, random "
        f"{mean['random']:.4f}, ratio {found['ratio']}, difference {found['mean_difference']} (t = {found['t']}), "
        f"better in {found['seeds_won']} of {len(runs)}",
        flush=True,
    )
    return found


def main() -> None:
    """Run the models named, or all, and write what they came to."""
    chosen = sys.argv[1:] or list(RECIPES)
    if unknown := set(chosen) - set(RECIPES):
        sys.exit(f"no model {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    settings = load(LearnSettings)
    data = load_data(Recipe(data=DataTable(corpus="imdb")), settings)
    data = replace(data, validation=None)
    for name in chosen:
        print(f"{name}:", flush=True)
        runs = []
        with local_ray(cpus=1) as scratch:
            for seed in SEEDS:
                runs.append(compare(name, seed, data, scratch))
                ways = runs[-1]["ways"]
                shown = ", ".join(f"{way} {ways[way]['loss']:.4f} ({ways[way]['training_s']} s)" for way in WAYS)
                print(
                    f"  seed {seed}, {runs[-1]['epochs']} epochs: {shown}",
                    flush=True,
                )
        result[name] = {"command": f"python benchmarks/bench_tune.py {name}"} | _circumstances() | summed_up(name, runs)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
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
