"""Training on a pool device through `torch.compile` comes to what it comes to op by op."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millpond.learn.order import padding_share, widened, width_unit
from worker_site import WorkerProcess

PROGRAM = Path(__file__).parent / "train_captured.py"


CAPTURED = ("ngram", "seqcnn", "encoder", "clipped")
"""Cases that take three messages a step: forward with loss, backward, update."""


@pytest.fixture
def trained(pretrained: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[dict[str, Any], str]]]:
    """Trains small models under a lease; returns what cases came to, and what was said on stderr."""
    worker = WorkerProcess(log=tmp_path / "worker.log")

    def train(*cases: str) -> tuple[dict[str, Any], str]:
        command = [sys.executable, str(PROGRAM), str(pretrained), *cases]
        environment = worker.environment()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    yield train
    worker.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("cases", [("ngram", "seqcnn", "clipped", "default"), ("encoder",)])
def test_a_captured_training_has_the_losses_of_an_eager_one_and_three_messages_a_step(
    trained: Callable[..., tuple[dict[str, Any], str]], cases: tuple[str, ...]
) -> None:
    results, said = trained(*cases)
    for case, ((eager, _), (captured, runs)) in results.items():
        assert captured == pytest.approx(eager, abs=1e-5), case
        assert runs[-1] == (3 * 7 if case in CAPTURED else 0), case  # seven steps
    assert "not captured" not in said
    assert "Profiler" not in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_cannot_be_captured_trains_op_by_op_and_says_why(
    trained: Callable[..., tuple[dict[str, Any], str]],
) -> None:
    reasons = {"lstm": "recurrent", "bfloat16": "mixed precision", "failing": "no graph today"}
    results, said = trained(*reasons)
    for case, ((eager, _), (captured, runs)) in results.items():
        assert captured == pytest.approx(eager, abs=1e-5), case
        assert not any(runs), case
    lines = [line for line in said.splitlines() if "not captured" in line]
    for line, reason in zip(lines, reasons.values(), strict=True):
        assert reason in line


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_captured_training_that_was_killed_goes_on_bit_for_bit(
    trained: Callable[..., tuple[dict[str, Any], str]],
) -> None:
    unbroken, (resumed, runs) = trained("resumed")[0]["resumed"]
    assert unbroken[0] == resumed
    assert runs[-1] > 7  # it may meet a width for the first time


def test_batches_that_are_padded_to_multiples_have_few_widths() -> None:
    lengths = np.random.default_rng(0).integers(1, 513, 5000)
    unit = width_unit(lengths, 32, pads_texts=True)
    widths = {widened(np.ones((1, length), np.int32), unit).shape[1] for length in lengths}
    assert len(widths) == 8
    assert all(width % unit == 0 for width in widths)
    totals = lengths[:4096].reshape(-1, 32).sum(1)
    unit = width_unit(lengths, 32, pads_texts=False)
    assert len({-(-total // unit) for total in totals}) <= 8


def test_widening_adds_zeros_at_the_end_and_counts_as_padding() -> None:
    assert widened(np.array([[1, 2, 3]], np.int32), 4).tolist() == [[1, 2, 3, 0]]
    assert widened(np.array([[1, 2, 3, 4]], np.int32), 4).tolist() == [[1, 2, 3, 4]]
    assert padding_share(np.array([3, 3]), [np.array([0, 1])], 4) == 0.25
