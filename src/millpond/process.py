"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent ends, however it ends.

    Call it first thing in the child, or as `preexec_fn`; it outlives exec. `parent`, where the caller knows it,
    is the pid that must still be the parent: it may have died before this call. The kernel watches the *thread*
    that forked (prctl(2), PR_SET_PDEATHSIG), so start such children from a thread that lives as long as the process.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
