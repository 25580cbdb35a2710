"""Training on a pool device through `torch.compile` comes to what it comes to op by op."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from millpond.learn.order import padding_share, widened, width_unit
from worker_site import WorkerProcess

PROGRAM = Path(__file__).parent / "train_captured.py"


@pytest.mark.slow
def test_a_captured_training_has_the_losses_of_an_eager_one_and_three_messages_a_step(tmp_path: Path) -> None:
    worker = WorkerProcess(log=tmp_path / "worker.log")
    try:
        command = [sys.executable, str(PROGRAM)]
        environment = worker.environment()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    finally:
        worker.close()
    assert done.returncode == 0, done.stderr
    for case, ((eager, _), (captured, runs)) in (trainings := json.loads(done.stdout)).items():
        assert captured == pytest.approx(eager, abs=1e-5), case
        if case == "resumed":  # in its last epoch it may meet a width for the first time
            assert runs[-1] > 7
        elif case in ("ngram", "seqcnn", "clipped"):
            assert runs[-1] == 3 * 7, case  # forward with loss, backward, update, in each of seven steps
        else:
            assert not any(runs), case
    # Bit for bit: what a checkpoint keeps of a captured training is all that there is to it.
    assert trainings["resumed"][0][0] == trainings["resumed"][1][0]
    lines = [line for line in done.stderr.splitlines() if "not captured" in line]
    assert [("recurrent" in line, "mixed precision" in line) for line in lines] == [(True, False), (False, True)]
    assert "Profiler" not in done.stderr


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
