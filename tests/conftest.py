"""Shared by all tests: an own home for each, and leaks that fail the test that leaves them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin take the cores of other tests
hypothesis.settings.register_profile("shared machine", deadline=None)  # a slow moment of the machine is no failure
hypothesis.settings.load_profile("shared machine")

GRACE_S = 5.0
"""A process or thread that is on its way out may take this long before it counts as left behind."""


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point HOME and MILLPOND_HOME below the test's own directory; no setting of the developer's reaches a test."""
    for variable in [name for name in os.environ if name.startswith("MILLPOND_") and name != "MILLPOND_DATA"]:
        monkeypatch.delenv(variable)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MILLPOND_HOME", str(home / "millpond"))
    return home


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a child process or a non-daemon thread behind; the processes are killed."""
    threads_before = set(threading.enumerate())
    processes_before = frozenset(_children())
    yield
    deadline = time.monotonic() + GRACE_S
    while True:
        threads = [thread for thread in set(threading.enumerate()) - threads_before if not thread.daemon]
        processes = set(_children(processes_before))
        if not threads and not processes:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    left = [f"thread {thread.name}" for thread in threads]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.append(f"process {process.pid} ({' '.join(process.cmdline()[:4])})")
            process.kill()
    pytest.fail(f"left behind: {', '.join(left)}")


def _children(known: frozenset[psutil.Process] = frozenset()) -> list[psutil.Process]:
    """Return the living children and theirs, less those that are known, with theirs (a service that outlives a test).

    They are asked of the kernel, for psutil would look at every process there is.
    """
    found: list[psutil.Process] = []
    waiting = [os.getpid()]
    while waiting:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for listed in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
                with contextlib.suppress(OSError, psutil.NoSuchProcess):
                    for pid in map(int, listed.read_text().split()):
                        process = psutil.Process(pid)
                        if process.status() != psutil.STATUS_ZOMBIE and process not in known:
                            found.append(process)
                            waiting.append(pid)
    return found
