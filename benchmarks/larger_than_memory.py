"""A corpus larger than memory: a generated file is read, prepared, encoded and trained on under a limit of memory.

The limit is RLIMIT_DATA, which the kernel holds against all private memory of the process: what is left beside it are
mapped files, which the kernel gives back whenever it wants to. `--gigabytes 5 --limit-gigabytes 2` is the claim; the
defaults are the same in small. Results go to benchmarks/results/larger_than_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import millpond

RESULT = Path(__file__).parent / "results/larger_than_memory.json"
WORDS = 100_000
LENGTH = 100
TELLING = {"negative": ["awful", "boring", "dull", "waste"], "positive": ["great", "lovely", "moving", "superb"]}
GIB = 1024**3


def generate(path: Path, size: int) -> int:
    """Write JSONL of texts of about 2 kB, long words by Zipf's law and two telling ones each; return how many."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"lengthyword{number:08x}" for number in range(WORDS)], object)
    share = 1 / np.arange(1, WORDS + 1)
    pool = rng.choice(vocabulary, 2**20, p=share / share.sum())
    texts = 0
    with path.open("wb") as file:
        while file.tell() < size:
            starts = rng.integers(0, len(pool) - LENGTH, 4096)
            for start in starts.tolist():
                label = ("negative", "positive")[texts % 2]
                telling = " ".join(rng.choice(TELLING[label], 2))
                words = " ".join(pool[start : start + LENGTH])
                file.write(f'{{"text": "{telling} {words} number{texts}", "label": "{label}"}}\n'.encode())
                texts += 1
    return texts


def memory_of(pid: int) -> tuple[int, int]:
    """Return bytes of anonymous memory in RAM, and of all private writable memory (what the limit counts)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return tuple(int(status.get(key, "0 kB").split()[0]) * 1024 for key in ("RssAnon", "VmData"))  # type: ignore


def train(data: Path, home: Path, limit: int) -> dict[str, object]:
    """Train under the limit and return what came of it."""
    command = [sys.executable, "-m", "millpond", "learn", "train", "--file", str(data), "--device", "cpu", "--json"]
    command += ["--option", "max_ngram=1", "--option", "buckets=1024", "--epochs", "1", "--batch-size", "1024"]
    started = time.monotonic()
    peak = (0, 0)
    with (home / "log").open("wb+") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | {"MILLPOND_HOME": str(home), "MALLOC_ARENA_MAX": "2"},
            stdout=subprocess.PIPE,
            stderr=log,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
        while process.poll() is None:
            try:
                peak = tuple(map(max, peak, memory_of(process.pid)))
            except (OSError, ValueError):
                break
            time.sleep(0.2)
        output, _ = process.communicate()
        if process.returncode:
            log.seek(0)
            sys.exit(log.read().decode()[-3000:])
    summary = json.loads(output)
    return {
        "accuracy": summary["test"]["accuracy"],
        "train_rows": summary["data"]["train_rows"],
        "test_rows": summary["data"]["test_rows"],
        "stages_s": summary["seconds"],
        "wall_s": round(time.monotonic() - started, 1),
        "peak_anonymous_mib": round(peak[0] / 2**20),
        "peak_private_mib": round(peak[1] / 2**20),
    }


def main() -> None:
    """Generate, train, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.3)
    parser.add_argument("--limit-gigabytes", type=float, default=1.0)
    parser.add_argument("--directory", type=Path, help="where the file and what is made of it lie for the time")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.directory) as temporary:
        data, home = Path(temporary) / "large.jsonl", Path(temporary) / "home"
        home.mkdir()
        texts = generate(data, int(given.gigabytes * GIB))
        result = {
            "command": f"python {' '.join(sys.argv)}",
            "millpond": millpond.__version__,
            "python": platform.python_version(),
            "processors": os.cpu_count(),
            "file_bytes": data.stat().st_size,
            "texts": texts,
            "limit_bytes": int(given.limit_gigabytes * GIB),
        } | train(data, home, int(given.limit_gigabytes * GIB))
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
