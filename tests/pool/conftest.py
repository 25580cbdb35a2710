"""A real worker process, and clients of it in processes of their own: PyTorch registers a device once per process."""

from __future__ import annotations

import contextlib
import inspect
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from worker_site import GIB, WorkerProcess, Workers


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """Start workers that end with the test."""
    started: list[WorkerProcess] = []

    def start(memory_bytes: int = GIB) -> WorkerProcess:
        started.append(WorkerProcess(memory_bytes, log=tmp_path / f"worker-{len(started)}.log"))
        return started[-1]

    yield start
    for worker in started:
        worker.close()


@pytest.fixture
def worker(start_worker: Callable[..., WorkerProcess]) -> WorkerProcess:
    """A worker with 1 GiB."""
    return start_worker()


class DeviceProcess:
    """A process under a lease that runs test functions, one after another."""

    def __init__(self, worker: WorkerProcess | Workers) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _RUN_FUNCTIONS],
            env={**worker.environment(), "PYTHONWARNINGS": "error"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, function: Callable[[], None]) -> None:
        """Run a function there by its source; its failure is this test's."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        source = textwrap.dedent(inspect.getsource(function))
        source = source[source.index("def ") :]
        message = {"name": function.__name__, "source": source, "file": f"{function.__name__}.py"}
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the process on the device ended with {self.process.wait()}"
        error = json.loads(answer)
        if error:
            pytest.fail(error, pytrace=False)

    def close(self) -> None:
        """End it."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait(10)


_RUN_FUNCTIONS = """
import contextlib, gc, io, json, linecache, os, sys, traceback
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
import pytest
import torch
torch.set_num_threads(1)
for line in sys.stdin:
    call = json.loads(line)
    linecache.cache[call["file"]] = (len(call["source"]), None, call["source"].splitlines(True), call["file"])
    namespace = {"torch": torch, "pytest": pytest}
    error = ""
    if "memory_allocated" in call["source"]:
        gc.collect()  # an earlier test's garbage would otherwise go at any moment, with its bytes
    try:
        exec(compile(call["source"], call["file"], "exec"), namespace)
        namespace[call["name"]]()
    except BaseException:  # pytest.fail is none of Exception
        error = traceback.format_exc()
    answers.write(json.dumps(error) + "\\n")
"""


def device(log: Path) -> Iterator[DeviceProcess]:
    """A process with a pool device of 1 GiB, until both are no longer needed."""
    with contextlib.closing(WorkerProcess(log=log)) as worker, contextlib.closing(DeviceProcess(worker)) as process:
        yield process


@pytest.fixture(scope="session")
def device_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceProcess]:
    """A process with a pool device, shared by all tests that run functions there."""
    yield from device(tmp_path_factory.mktemp("worker") / "worker.log")


@pytest.fixture(scope="session")
def cuda_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceProcess]:
    """The same for tests that say `cuda`: a program that has is shown no other name."""
    yield from device(tmp_path_factory.mktemp("worker") / "worker.log")


@pytest.fixture(scope="session")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """The workers of a lease of two devices, of 1 GiB each."""
    with contextlib.closing(Workers(log=tmp_path_factory.mktemp("workers") / "worker")) as workers:
        yield workers


@pytest.fixture(scope="session")
def two_devices(two_workers: Workers) -> Iterator[DeviceProcess]:
    """A process with the two devices, which says `cuda`."""
    with contextlib.closing(DeviceProcess(two_workers)) as process:
        yield process
