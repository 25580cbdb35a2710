"""What a process that computes for others may do to its host: that, and read the libraries that it takes.

Native kernels run on a client's arguments, so one may be made to run its code: in the pool's workers, and in Paddle's
training for a lease. What is taken away here needs no privileges and cannot be had back: new privileges, and root's,
core dumps, large files, being read by others; and, where the kernel has Landlock (5.13 and later), other files,
programs, processes and connections.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib.util
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

MAX_FILE_BYTES = 16 * 1024 * 1024
"""Longest file that a worker may write, where it may write one at all: its log, if that is a file."""
MAX_FILES = 4096

INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_", "PYTHON", "TORCH"),
    *("PYTORCH_", "CUDA_", "CUDNN_", "CUBLAS", "NVIDIA_", "HIP_", "HSA_", "ROC", "OMP_", "KMP_", "GOMP_", "MKL_"),
    *("OPENBLAS_", "ATEN_", "MALLOC_", "MILLPOND_POOL_CONFINE"),
)
"""How the variables begin that a worker inherits: what finds and tunes libraries. All others may be secrets."""
LIBRARIES = (
    *("/usr", "/lib", "/lib64", "/opt", "/nix/store", "/run/opengl-driver", "/proc", "/sys"),
    *("/etc/ld.so.cache", "/etc/localtime", "/etc/nsswitch.conf", "/etc/passwd", "/etc/hosts", "/etc/nvidia"),
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
GPU_DEVICES = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd", "/dev/dri", "/dev/shm")  # noqa: S108

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_CAPABILITIES_3 = 0x20080522
_OF_ROOT = 1 << 1
"""Of root's capabilities, that over files of others stays, since libraries may be theirs."""
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on all architectures
_READ_FILE, _READ_DIR, _WRITE_FILE, _TRUNCATE, _IOCTL_DEVICE = 1 << 2, 1 << 3, 1 << 1, 1 << 14, 1 << 15
_REMOVE_FILE, _MAKE_FILE = 1 << 5, 1 << 8
_OF_FILES = _READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEVICE
_CONNECT_TCP = 1 << 1
_SCOPES = 0b11
"""Abstract sockets and signals of processes outside."""
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many rights over files there are, by Landlock's version; 16 since the fifth."""

_libc = ctypes.CDLL(None, use_errno=True)


DEFAULTS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_WAIT_POLICY": "PASSIVE"}
"""What a worker is given where its host says nothing.

Without the first, cuBLAS refuses a program that wants determinism. PyTorch's own workspace on Hopper has that size; on
older GPUs it is 8 instead of 32 MiB. By the second, threads that wait for one another sleep: they would spin for
milliseconds, on cores that a lease's client, or another lease's worker, could use.
"""


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what a worker inherits of an environment."""
    return DEFAULTS | {name: value for name, value in environ.items() if name.startswith(INHERITED)}


def confine(*, gpu: bool, connects: bool, files: Iterable[str] = (), writes: str = "") -> str:
    """Take from this process, whose only thread this must be, what a worker does not need; return what could not be.

    `connects` is whether it calls others (its peers), `files` what else it reads, `writes` the one directory in which
    it may also write, make, rename and delete files.
    """
    if gpu:
        _make_devices()
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: MAX_FILES}
    if not gpu and not writes:  # it holds for a driver's shared memory too
        limits[resource.RLIMIT_FSIZE] = MAX_FILE_BYTES
    for limit, most in limits.items():
        soft, hard = (most if was == resource.RLIM_INFINITY else min(was, most) for was in resource.getrlimit(limit))
        resource.setrlimit(limit, (soft, hard))
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if os.geteuid() == 0:
        _libc.capset(struct.pack("Ii", _CAPABILITIES_3, 0), struct.pack("6I", _OF_ROOT, _OF_ROOT, *4 * (0,)))
    version = _libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return f"this host's kernel has no Landlock ({os.strerror(ctypes.get_errno())})"
    if not _restrict(version, gpu, connects, files, writes):
        return f"this host's kernel refuses a Landlock ruleset ({os.strerror(ctypes.get_errno())})"
    os.environ["PATH"] = ""  # none can be run: Python would look for a library by a compiler, and fail on finding one
    others = len(os.listdir("/proc/self/task")) - 1  # noqa: PTH208
    return f"{others} thread(s) began before" if others else ""


def _make_devices() -> None:
    """Have CUDA's device files made where they are missing: its driver could not start the setuid program later."""
    program = shutil.which("nvidia-modprobe")
    if program and not Path("/dev/nvidia-uvm").exists():
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run([program, "-u", "-c=0"], check=False, timeout=30)


def _restrict(version: int, gpu: bool, connects: bool, files: Iterable[str], writes: str) -> bool:
    handled = (1 << _FILE_RIGHTS.get(version, 16)) - 1
    tcp = _CONNECT_TCP if version >= 4 and not connects else 0
    attributes = struct.pack("QQQ", handled, tcp, _SCOPES if version >= 6 else 0)
    ruleset = _libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    try:
        for path in {*LIBRARIES, *_python(), *files}:
            _allow(ruleset, path, (_READ_FILE | _READ_DIR) & handled)
        for pattern in (*DEVICES, *(GPU_DEVICES if gpu else ())):
            for path in glob.glob(pattern):  # noqa: PTH207
                _allow(ruleset, path, (_OF_FILES | _READ_DIR | _MAKE_FILE | _REMOVE_FILE) & handled)
        if writes:
            _allow(ruleset, writes, (_OF_FILES | _READ_DIR | _MAKE_FILE | _REMOVE_FILE) & handled)
        return bool(_libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    """Allow rights over what is at a path, and beneath it; nothing, if nothing is there."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rule = struct.pack("=Qi", rights if Path(path).is_dir() else rights & _OF_FILES, place)
        _libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
    finally:
        os.close(place)


def _python() -> set[str]:
    """Return where Python and its packages lie; not the directory that it was started in, which `-m` adds."""
    path = sys.path if sys.flags.safe_path else sys.path[1:]
    packages = {place for name in ("millpond", "torch") if (spec := importlib.util.find_spec(name)) is not None
                for place in spec.submodule_search_locations or ()}  # fmt: skip
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return {sys.prefix, sys.base_prefix, sys.exec_prefix, *packages, *filter(None, (*path, *libraries))} - {"/"}
