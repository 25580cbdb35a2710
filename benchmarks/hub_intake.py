"""How many corrections a second the hub takes in, each on its disk before it is acknowledged.

A real hub process on loopback, four edges that send batches as edges do, texts as long as IMDB reviews (mean 1,300
characters). Run: `python benchmarks/hub_intake.py --json benchmarks/results/hub_intake.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

EDGES = 4
WORDS = [
    "the",
    "film",
    "was",
    "moving",
    "dreary",
    "and",
    "its",
    "actors",
    "clumsy",
    "a",
    "superb",
    "plot",
    "of",
    "lies",
]


def batches(edge: int, count: int, size: int) -> list[bytes]:
    chance = random.Random(edge)
    return [
        json.dumps(
            {"edge": f"edge-{edge}", "corrections": [one(chance, f"{edge}-{at}-{n}") for n in range(size)]}
        ).encode()
        for at in range(count)
    ]


def one(chance: random.Random, correction_id: str) -> dict[str, Any]:
    words = chance.choices(WORDS, k=max(20, int(chance.gauss(240, 120))))
    scores = {"negative": 0.41, "positive": 0.59}
    return {
        "id": correction_id,
        "text": " ".join(words),
        "label": "negative",
        "predicted": "positive",
        "scores": scores,
    }


def measure(url: str, size: int, seconds: float, run: int) -> dict[str, float]:
    """Send batches of `size` for about `seconds`; return corrections a second and the batch's time in ms."""
    taken: list[float] = []
    stored = 0
    lock = threading.Lock()
    prepared = [batches(1000 * run + edge, 400 if size < 50 else 100, size) for edge in range(EDGES)]
    began = time.perf_counter()

    def send(bodies: list[bytes]) -> None:
        nonlocal stored
        with httpx.Client(base_url=url, timeout=60) as http:
            for body in bodies:
                if time.perf_counter() - began > seconds:
                    return
                start = time.perf_counter()
                answer = http.post("/api/v1/corrections", content=body, headers={"Content-Type": "application/json"})
                answer.raise_for_status()
                with lock:
                    taken.append(time.perf_counter() - start)
                    stored += len(answer.json()["stored"])

    senders = [threading.Thread(target=send, args=(bodies,)) for bodies in prepared]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    passed = time.perf_counter() - began
    taken.sort()
    return {
        "batch": size,
        "corrections": stored,
        "corrections_per_s": round(stored / passed, 1),
        "batch_ms_median": round(statistics.median(taken) * 1000, 1),
        "batch_ms_p99": round(taken[int(len(taken) * 0.99)] * 1000, 1),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--seconds", type=float, default=5.0)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as home:
        environ = os.environ | {"MILLPOND_HOME": home, "MILLPOND_HUB_PORT": "0", "PYTHONUNBUFFERED": "1"}
        hub = subprocess.Popen([sys.executable, "-m", "millpond", "hub", "serve"], env=environ, stdout=subprocess.PIPE)
        try:
            assert hub.stdout is not None
            lines = iter(hub.stdout.readline, b"")
            url = next(found[1].decode() for line in lines if (found := re.search(rb"listening on (\S+)", line)))
            measure(url, 10, 1.0, 9)  # connections and caches
            results = [measure(url, size, chosen.seconds, run) for run, size in enumerate((1, 20, 200))]
        finally:
            hub.terminate()
            hub.wait(20)
            hub.stdout.close()
    report = {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "load": round(os.getloadavg()[0], 1)},
        "versions": {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version},
        "edges": EDGES,
        "results": results,
    }
    print(json.dumps(report, indent=2))
    if chosen.json:
        chosen.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
