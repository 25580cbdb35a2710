"""A long loop leaves memory flat on both sides."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import gc, json, os
import psutil, torch

both = [psutil.Process(), psutil.Process(json.loads(os.environ["MILLPOND_POOL_WORKERS"])[0]["pid"])]

def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
    loss.item()
    gc.collect()
    torch.pool.synchronize()
    return torch.pool.memory_allocated(), [process.memory_info().rss for process in both]

torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).to("pool")
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
inputs = torch.randn(8, 16).to("pool")
used, before = train(2000)
for _ in range(2):
    again, after = train(5000)
    assert again == used
    assert all(now - then < 16 * 2**20 for now, then in zip(after, before)), (before, after)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_steps_leave_memory_as_it_was(worker):
    """About a minute on two cores."""
    done = worker.run(PROGRAM, timeout_s=590)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_models_that_are_made_and_dropped_leave_memory_as_it_was(worker):
    program = Path(__file__).parents[1] / "programs/keep_training.py"
    command = [sys.executable, str(program), "100"]
    done = subprocess.run(command, env=worker.environment(), capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    drops = [[int(number) for number in line[2:]] for line in lines if line[0] == "drop"]
    settled, after = drops[5], drops[10]
    assert after[2] == settled[2] == 0
    assert all(now - then < 16 * 2**20 for now, then in zip(after[:2], settled[:2], strict=True)), (settled, after)
