"""The loop of the hub with the real training job: `millpond learn job`, the real model, the real rule."""

from __future__ import annotations

import csv
import random
import shlex
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OLD = {"positive": ["superb", "moving", "delightful"], "negative": ["dreary", "clumsy", "lifeless"]}
NEW = {"positive": ["zorpish"], "negative": ["flumpish"]}
FILLER = [
    "the",
    "film",
    "was",
    "in",
    "every",
    "scene",
    "and",
    "its",
    "actors",
    "were",
    "for",
    "most",
    "of",
    "the",
    "evening",
    "on",
    "screen",
    "there",
]


def sentence(chance: random.Random, word: str) -> str:
    words = chance.choices(FILLER, k=12)
    words.insert(chance.randrange(12), word)
    return " ".join(words)


def test_corrections_teach_the_real_model_a_word_and_it_is_promoted(
    bench: Any, serve: Callable[..., Any], tmp_path: Any
) -> None:
    chance = random.Random(5)
    with (bench.recipe.parent / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "split"])
        for number in range(2000):
            label = ("positive", "negative")[number % 2]
            split = "test" if number < 800 else "train"
            writer.writerow([sentence(chance, chance.choice(OLD[label])), label, split])
    bench.recipe.write_text('[data]\nfile = "reviews.csv"\nsplit = "split"\n[model]\narchitecture = "ngram"\n')
    command = shlex.join([sys.executable, "-m", "millpond", "learn", "job"])
    served = serve(MILLPOND_HUB_TRAIN_COMMAND=command, MILLPOND_HUB_RETRAIN_AFTER="60", MILLPOND_LEARN_THREADS="1")
    with httpx.Client(base_url=served.url, timeout=20) as http:

        def decided(count: int) -> bool:
            jobs = http.get("/api/v1/jobs").json()["jobs"]
            assert all(job["failures"] == 0 for job in jobs), http.get(f"/api/v1/jobs/{jobs[0]['id']}/log").text
            return len(http.get("/api/v1/promotions").json()["promotions"]) == count

        http.post("/api/v1/jobs", json={})
        served.wait(lambda: decided(1), 120)
        items = []
        for number in range(60):
            label = ("positive", "negative")[number % 2]
            items.append({"id": f"n-{number}", "text": sentence(chance, NEW[label][0]), "label": label})
        receipt = http.post("/api/v1/corrections", json={"edge": "e", "corrections": items}).json()
        assert len(receipt["stored"]) == 60
        decisions = [{"id": item["id"], "decision": "accept"} for item in items]
        http.post("/api/v1/reviews", json={"reviewer": "rule:test", "decisions": decisions})
        served.wait(lambda: decided(2), 120)
        newest = http.get("/api/v1/promotions").json()["promotions"][0]
        assert (newest["version"], newest["champion"], newest["promoted"]) == ("v2", "v1", True), newest["reasons"]
        assert newest["heldout"]["candidate_accuracy"] > newest["heldout"]["champion_accuracy"]
        assert http.get("/v2/sentiment/manifests/champion").headers["Docker-Content-Digest"] == newest["digest"]
        assert http.post("/api/v1/rollback", json={}).json()["version"] == "v1"
