"""A corpus larger than the memory that is left: read, prepared, encoded and trained on, in a process with a limit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
FILE_BYTES = 256 * MIB
LEFT_BYTES = 128 * MIB
"""Private memory that the process may take beyond what its imports and threads have."""

PROGRAM = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from millpond.learn.encoded import Encoded
from millpond.learn.gather import read_files
from millpond.learn.models import build, options_of
from millpond.learn.prepared import PreparedSets
from millpond.learn.options import TrainOptions
from millpond.learn.train import complete, predict, train
from millpond.text import TextEncoder

torch.set_num_threads(1)
options = options_of("ngram", {"max_ngram": 1, "buckets": 1024})
warm = torch.ones(2, requires_grad=True)  # autograd and the optimizer have their threads and modules
torch.autograd.backward(warm.sum())
torch.optim.Adam([warm], foreach=True).step()
TextEncoder.learn(["a b"] * 9, options.text_config(), min_count=1, max_vocabulary=10).encode(["a"])
private = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
limit = private + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

sets = PreparedSets(Path(sys.argv[2]), 10**12) if sys.argv[2] else None
dataset = read_files("large", sys.argv[1], sets=sets)
learned = dataset.train
encoder = TextEncoder.learn(learned.texts, options.text_config(), min_count=2, max_vocabulary=50_000)
data = Encoded.of(encoder, learned.texts)
model = build("ngram", options, encoder.rows, 2)
model.prepare(data, learned.labels)
how = complete(TrainOptions(epochs=1), "ngram", len(data))
train(model, data, learned.labels, None, how, torch.device("cpu"), seed=0)
answers = predict(model, Encoded.of(encoder, dataset.test.texts), torch.device("cpu")).argmax(1)
print(len(dataset.train), len(dataset.test), (answers == dataset.test.labels).mean())
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL of texts of 16 kB, of which few words say the label."""
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    filler = [" ".join(f"filler{number}word{'x' * 100}{i}" for i in range(128)) for number in range(64)]
    with path.open("w") as file:
        number = 0
        while file.tell() < FILE_BYTES:
            label = ("bad", "good")[number % 2]
            file.write(f'{{"text": "number {number} {label} {filler[number % 64]}", "label": "{label}"}}\n')
            number += 1
    return path


def run(large: Path, place: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(large), place, str(LEFT_BYTES)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_corpus_twice_as_large_as_the_memory_left_trains_from_disk_and_not_in_memory(
    large: Path, tmp_path: Path
) -> None:
    done = run(large, str(tmp_path / "prepared"))
    assert done.returncode == 0, done.stderr
    train, test, accuracy = done.stdout.split()
    assert int(train) > 3 * int(test) > 1000
    assert float(accuracy) == 1.0
    in_memory = run(large, "")
    assert in_memory.returncode != 0
    assert "MemoryError" in in_memory.stderr
