"""The default dtype of a program, for its ops at the worker, whose sessions may belong to programs with different ones.

PyTorch has one for the process, and asks for it when it promotes integers and numbers. So ops of the same default run
side by side, and those of another one take turns with them.
"""

from __future__ import annotations

import threading

import torch

_lock = threading.Lock()
_idle = threading.Condition(_lock)
_running = 0
"""How many ops run under the default that there is now."""
_waiting = 0
"""How many wait until none runs: newcomers then wait too, so that an end comes to every wait."""


class DefaultDtype:
    """Makes a dtype PyTorch's default for the length of a `with` block. Can be used again, and by several threads."""

    __slots__ = ("_dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __enter__(self) -> None:
        global _running, _waiting
        with _lock:
            if _waiting or torch.get_default_dtype() is not self._dtype:
                _waiting += 1
                while _running:
                    _idle.wait()
                _waiting -= 1
                torch.set_default_dtype(self._dtype)
            _running += 1

    def __exit__(self, *exception: object) -> None:
        global _running
        with _lock:
            _running -= 1
            if not _running and _waiting:
                _idle.notify_all()
