"""What this host can lend: its GPUs, or its CPU where it has none.

GPUs are looked up in a child process, so that the broker itself neither loads torch nor holds a CUDA context.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil

from millpond.pool.errors import PoolError
from millpond.pool.scheduler import Device
from millpond.settings import SettingsError

LOOK_S = 120.0
"""How long the look for GPUs may take: the first load of torch and the driver."""
DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""Where none of these is, there is no GPU that torch could use."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
UNITS |= {f"{letter}iB".upper(): UNITS[letter] for letter in "KMGT"} | {"TB": 10**12}


class Gpu(msgspec.Struct, frozen=True):
    """A GPU as torch sees it."""

    name: str
    memory_bytes: int


def find_devices(memory: str = "") -> list[Device]:
    """Return the devices of this host; `memory` is what its CPU offers if it has no GPU (empty: half).

    Raises:
        SettingsError: `memory` is not a size.
        PoolError: the GPUs of this host cannot be looked up.
    """
    gpus = _find_gpus() if any(Path(driver).exists() for driver in DRIVERS) else []
    if gpus:
        return [Device(i, gpu.name[:100], f"cuda:{i}", gpu.memory_bytes) for i, gpu in enumerate(gpus)]
    offered = parse_size(memory, "MILLPOND_POOL_MEMORY") if memory else host_memory_bytes() // 2
    return [Device(0, f"CPU ({len(os.sched_getaffinity(0))} cores)", "cpu", offered)]


def host_memory_bytes() -> int:
    """Return the memory of this host, or of this container where that is less."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no such limit here, or "max"
        return total


def parse_size(text: str, what: str) -> int:
    """Return the bytes that a size such as `4GiB`, `500MB` or `8G` (as GiB) means; `what` is named in the error.

    Raises:
        SettingsError: it is not a size above zero.
    """
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([A-Za-z]{0,3})\s*", text)
    size = int(float(found[1]) * UNITS.get(found[2].upper(), 0)) if found else 0
    if not 0 < size < 2**62:
        raise SettingsError(f"{what} is {text!r}, which is not a size. Write one such as 4GiB or 500MB.")
    return size


def _find_gpus() -> list[Gpu]:
    command = [sys.executable, "-m", "millpond.pool.monitor"]
    try:
        found = subprocess.run(command, capture_output=True, timeout=LOOK_S, check=True, stdin=subprocess.DEVNULL)
        return msgspec.json.decode(found.stdout.splitlines()[-1], type=list[Gpu])
    except subprocess.CalledProcessError as error:
        why = error.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {error.returncode}"]
        raise PoolError(f"The GPUs of this host cannot be used: {why[0]}. Does nvidia-smi work here?") from error
    except (subprocess.TimeoutExpired, msgspec.DecodeError, IndexError) as error:
        raise PoolError(f"The GPUs of this host did not answer: {error}. Does nvidia-smi work here?") from error


def _print_gpus() -> None:
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    sys.stdout.write(msgspec.json.encode([Gpu(gpu.name, gpu.total_memory) for gpu in gpus]).decode() + "\n")


if __name__ == "__main__":
    _print_gpus()
