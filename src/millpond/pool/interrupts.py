"""A Ctrl-C that would fall between taking bytes from a connection and having them, put off until it does no harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def hold_back_interrupts() -> Iterator[None]:
    """Put off a Ctrl-C to the end of the block, so that a message is sent or received whole; take a second one."""
    original = signal.getsignal(signal.SIGINT)
    if not callable(original) or threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[FrameType | None] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            original(number, frame)
        held.append(frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, original)
    if held:
        original(signal.SIGINT, held[0])
