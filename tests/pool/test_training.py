"""Training on the pool device gives what training on the host gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "train_models.py"


def losses(device: str, environment: dict[str, str] | None = None) -> dict[str, list[float]]:
    command = [sys.executable, str(PROGRAM), device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_both_models_train_alike_on_the_pool_and_on_the_host_with_every_optimizer(worker):
    pooled, local = losses("pool", worker.environment()), losses("cpu")

    assert pooled.keys() == local.keys()
    for run, expected in local.items():
        assert len(expected) == 50
        assert pooled[run] == pytest.approx(expected, abs=1e-5), run
