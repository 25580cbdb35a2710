"""Things end at the worst moment: the other side says so in time, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from millpond.pool import wire
from pool_site import wait_for

LIMIT_S = 10.0

TRAIN = """
import torch
weight = torch.ones(64, 64, device="pool", requires_grad=True)
print("training", flush=True)
while True:
    (weight @ weight).sum().backward()
    weight.grad.mean().item()
"""

STREAM = """
import torch
there = torch.ones(64, 64, device="pool")
print("training", flush=True)
while True:
    there = there * 1.0
"""

SLEEP = """
import sys, torch
there = torch.ones(3, device="pool")
there.sum().item()
print("training", flush=True)
sys.stdin.readline()
there.sum().item()
"""


def start(worker, program: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=worker.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    return process


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(TRAIN, id="reading"),
        pytest.param(STREAM, id="streaming", marks=pytest.mark.slow),
        pytest.param(SLEEP, id="idle", marks=pytest.mark.slow),
    ],
)
def test_a_killed_worker_is_named_by_the_error_of_its_client(worker, program):
    with start(worker, program) as process:
        worker.process.kill()
        killed = time.monotonic()
        _, errors = process.communicate("go on\n", timeout=30)
        assert time.monotonic() - killed < LIMIT_S
    assert process.returncode == 1
    assert "ConnectionLost: lost the pool device pool:0 (lease lease-1, worker 127.0.0.1:" in errors
    assert f"process {worker.process.pid})" in errors
    assert "millpond pool status" in errors


@pytest.mark.slow
def test_a_killed_client_leaves_nothing_at_the_worker(worker):
    with start(worker, TRAIN) as process:
        wait_for(lambda: worker.next_report().used_bytes > 0)
        process.kill()
        killed = time.monotonic()
    wait_for(lambda: (report := worker.next_report()).sessions == 0 and report.used_bytes == 0)
    assert time.monotonic() - killed < LIMIT_S
    with worker.connect() as connection:
        connection.send(wire.Batch([wire.GetUsage()]))
        usage, _ = connection.receive(LIMIT_S)
    assert isinstance(usage, wire.Usage)
    assert usage.used_bytes == 0


@pytest.mark.slow
def test_a_worker_ends_with_its_broker(start_worker, tmp_path):
    # A broker that starts a worker and is killed, in a process of its own.
    broker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pathlib, time, worker_site\n"
            f"worker = worker_site.WorkerProcess(log=pathlib.Path({str(tmp_path / 'log')!r}))\n"
            "print(worker.process.pid, flush=True)\n"
            "time.sleep(100)",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with broker:
        assert broker.stdout is not None
        pid = int(broker.stdout.readline())
        broker.kill()
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, LIMIT_S)


@pytest.mark.slow
def test_a_stopped_client_does_not_hold_up_another(worker):
    with start(worker, STREAM) as process:
        process.send_signal(signal.SIGSTOP)
        with worker.connect() as connection:
            connection.send(wire.Batch([wire.Synchronize()]))
            assert isinstance(connection.receive(LIMIT_S)[0], wire.Done)
        process.kill()


@pytest.mark.slow
def test_a_lease_that_is_no_longer_there_is_told_at_the_first_op(worker):
    assert worker.port  # it has reported
    worker.process.kill()
    worker.process.wait()
    done = worker.run("import torch\ntorch.ones(1, device='pool')")
    assert done.returncode == 1
    assert f"ConnectionLost: nothing answers at 127.0.0.1:{worker.port}" in done.stderr


def test_importing_torch_without_a_lease_loads_nothing_of_the_pool():
    program = "import sys, torch; print([name for name in sys.modules if name.startswith('millpond.pool.')])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_POOL")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "['millpond.pool.attach']"


def test_an_op_is_waited_for_if_the_program_asks_for_that(worker, monkeypatch):
    program = """
import torch
index = torch.tensor([7], device="pool")
try:
    torch.ones(3, device="pool").index_select(0, index)
    print("late")
except IndexError:
    print("at once")
print(torch.ones(3, device="pool").sum().item())
"""
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert worker.run(program).stdout.split() == ["at", "once", "3.0"]
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING")
    assert worker.run(program).stdout.startswith("late")
