"""Backward passes over a device that is made in Python: what a hook raises gets out, and several devices work.

PyTorch's C++ guard asks ours for its type also while a Python exception is on its way out of a hook; asking Python for
anything then ends the process (torch 2.13). So our guard takes the exception, and who called the pass raises it.
"""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

_taken: deque[BaseException] = deque(maxlen=64)
"""Exceptions that were on their way out of hooks, in autograd's threads; oldest first."""

_raise_pending = ctypes.pythonapi.Py_IsInitialized
"""After any such call ctypes raises what is on its way."""
_PRIVATE_USE = torch._C._autograd.DeviceType.PrivateUse1


class Guard(torch._C._acc.DeviceGuard):
    """What PyTorch asks about the current device."""

    def type_(self) -> Any:
        """Return the type of the device, and take an exception that is on its way.

        Until it is taken no attribute may be looked up: Python clears it where its cache of attributes has no answer.
        """
        try:
            _raise_pending()
        except BaseException as error:
            _taken.append(error)
        return _PRIVATE_USE


def install(devices: int) -> None:
    """Have backward passes raise what the guard has taken, and run in one thread if there are several devices."""
    for owner in (torch.autograd, torch.autograd.graph):
        owner._engine_run_backward = _raising(owner._engine_run_backward, devices > 1)  # type: ignore[attr-defined]


def _raising(backward: Callable[..., Any], in_one_thread: bool) -> Callable[..., Any]:
    @functools.wraps(backward)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            if not in_one_thread:
                return backward(*args, **kwargs)
            with torch.autograd.set_multithreading_enabled(False):  # autograd has a thread for the first device only
                return backward(*args, **kwargs)
        except SystemError:  # "returned NULL without setting an exception": it was taken
            if not _taken:
                raise
            error = _taken.popleft()
        _taken.clear()
        raise error

    return run
