"""Waiting for what another process or thread does: asked again and again until a deadline, never a sleep."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")

DEADLINE_S = 30.0
PAUSE_S = 0.01


def wait_for(
    condition: Callable[[], T],
    within_s: float = DEADLINE_S,
    *,
    what: str | Callable[[], str] = "",
    despite: tuple[type[Exception], ...] = (),
) -> T:
    """Return the first true value of `condition`, which may raise what is in `despite` until then.

    Where it is waited for in vain, the failure says `what`: its name, or a log that says why.
    """
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(*despite):
            if value := condition():
                return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {within_s} s in vain: {what if isinstance(what, str) else what()}")
        time.sleep(PAUSE_S)


def is_alive(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
