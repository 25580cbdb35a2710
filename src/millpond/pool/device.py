"""`torch.device("pool")`: the device module `torch.pool`, and its registration with PyTorch.

Registered once per process and only where a lease is set; the connection to the worker is made at the first use.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import backend_registration

from millpond.pool import (
    attach,
    backward,
    capture,
    cuda,
    cuda_runtime,
    kernels,
    parallel,
    recurrent,
    shims,
    sparse,
    tensors,
    tls,
    transport,
    wire,
)
from millpond.pool.errors import LeaseError
from millpond.pool.link import Dialler, Link
from millpond.pool.session import Session
from millpond.pool.tensors import DEVICE
from millpond.settings import PoolSettings, load


class _Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return True

    def has_primary_context(self, index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class _Current(threading.local):
    """The device that a thread chose: each has its own, as with CUDA."""

    index = 0


class DeviceModule:
    """`torch.pool`: what PyTorch and programs ask of a device."""

    __name__ = f"torch.{DEVICE}"

    def __init__(self, lease: str, workers: list[wire.WorkerAddress]) -> None:
        self.lease = lease
        self.workers = workers
        self._sessions: dict[int, Session] = {}
        self._lock = threading.RLock()
        self._current = _Current()
        self._seed: int | None = None
        """What the program seeded all devices with; None before it has."""
        self._process = os.getpid()
        """The process whose the sessions are."""

    def session(self, index: int | None = None) -> Session:
        """Return the session of a device, connecting at first use.

        Raises:
            LeaseError: the lease has no such device.
            ConnectionLost, HandshakeError: its worker cannot be reached.
            SettingsError: the files of TLS cannot be used.
        """
        index = self._current.index if index is None else index
        session = self._sessions.get(index)
        if session is not None:
            return session
        if index >= len(self.workers):
            raise LeaseError(f"{cuda.name(index)} does not exist: lease {self.lease} has {len(self.workers)} device(s)")
        with self._lock:
            if index not in self._sessions:
                self._sessions[index] = self._begin(index)
                self._sessions[index].seed(self.initial_seed())
                self._process = os.getpid()
        return self._sessions[index]

    def _begin(self, index: int) -> Session:
        worker = self.workers[index]
        security = tls.caller(load(PoolSettings))

        def dial(connect_s: float = transport.GREETING_S) -> tuple[transport.Connection, wire.Welcome]:
            return transport.connect(
                worker.host,
                worker.port,
                worker.token,
                str(torch.__version__),
                sends="to-worker",
                receives="from-worker",
                security=security,
                connect_s=connect_s,
            )

        connection, welcome = dial()
        opening = wire.Attach(secrets.token_bytes(16))
        connection.send(opening)
        dialler = Dialler(lambda: dial(transport.REDIAL_S)[0], opening, welcome.grace_s, why_ended=attach.why_ended)
        return Session(
            Link(connection, dialler),
            index=index,
            lease=self.lease,
            worker=f"{worker.host}:{worker.port}, process {worker.pid}",
            memory_bytes=welcome.memory_bytes,
            on_gpu=welcome.device != "cpu",
        )

    def close(self) -> None:
        """End all sessions."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def is_available(self) -> bool:
        """Return True: the device is registered only where there is a lease."""
        return True

    _initialized = True  # what checkpointing looks at

    def __getattr__(self, name: str) -> Any:
        """Return what `torch.cuda` has under a name, for what is not here."""
        if name in cuda_runtime.NAMES:
            return getattr(cuda_runtime, name)
        raise AttributeError(f"module 'torch.{DEVICE}' has no attribute '{name}'")

    def is_initialized(self) -> bool:
        """Return True: a connection is made when it is needed."""
        return True

    def init(self) -> None:
        """Do nothing: see `is_initialized`."""

    def _is_in_bad_fork(self) -> bool:
        return bool(self._sessions) and os.getpid() != self._process

    def device_count(self) -> int:
        """Return how many devices the lease has."""
        return len(self.workers)

    def current_device(self) -> int:
        """Return the index of the device that `pool` without an index means."""
        return self._current.index

    def set_device(self, device: int | str | torch.device) -> None:
        """Choose the device that `pool` without an index means."""
        index = device if isinstance(device, int) else torch.device(device).index or 0
        if not 0 <= index < len(self.workers):
            raise LeaseError(f"{cuda.name(index)} does not exist: lease {self.lease} has {len(self.workers)} device(s)")
        self._current.index = index

    def exchange_device(self, index: int) -> int:
        """Choose a device, unless it is below 0; return the one that was chosen before."""
        before = self._current.index
        if index >= 0:
            self.set_device(index)
        return before

    @contextlib.contextmanager
    def device(self, device: int | str | torch.device | None) -> Iterator[None]:
        """Choose a device for the length of a `with` block; None and -1 leave it as it is."""
        before = self._current.index
        if device is not None and device != -1:
            self.set_device(device)
        try:
            yield
        finally:
            self._current.index = before

    def get_device_name(self, device: Any = None) -> str:
        """Return the name of the worker's device."""
        return self.workers[_index(device, self._current.index)].device

    def is_gpu(self, device: Any = None) -> bool:
        """Return whether the worker of a device computes on a GPU: its name may be anything."""
        return self.session(_index(device, self._current.index)).on_gpu

    def synchronize(self, device: Any = None) -> None:
        """Wait until everything issued so far has run; raise what failed."""
        self.session(_index(device, self._current.index)).request(wire.Synchronize(), wire.Done, "synchronize")

    def manual_seed(self, seed: int) -> None:
        """Seed the generator of the current device."""
        self.session().seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed the generators of all devices; one that has not been used yet is seeded alike when it is."""
        self._seed = seed
        for session in list(self._sessions.values()):
            session.seed(seed)

    def initial_seed(self) -> int:
        """Return the seed that the generators of all devices began with."""
        return torch.initial_seed() if self._seed is None else self._seed

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """Return the state of a device's generator."""
        return self.session(_index(device, self._current.index)).random_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """Set the state of a device's generator."""
        self.session(_index(device, self._current.index)).set_random_state(state)

    def usage(self, device: Any = None) -> wire.Usage:
        """Return the lease's memory: in use, peak, limit; and what CUDA says of a GPU."""
        session = self.session(_index(device, self._current.index))
        return session.request(wire.GetUsage(), wire.Usage, "usage")[0]

    def memory_allocated(self, device: Any = None) -> int:
        """Return bytes in use."""
        return self.usage(device).used_bytes

    def max_memory_allocated(self, device: Any = None) -> int:
        """Return the most bytes in use so far."""
        return self.usage(device).peak_bytes

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """Count the most bytes in use anew from here."""
        session = self.session(_index(device, self._current.index))
        session.request(wire.GetUsage(reset_peak=True), wire.Usage, "usage")

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Return free and total bytes."""
        usage = self.usage(device)
        return usage.limit_bytes - usage.used_bytes, usage.limit_bytes

    def empty_cache(self) -> None:
        """Send the frees that wait for company."""
        for session in list(self._sessions.values()):
            session.flush()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Return the dtypes of `torch.autocast("pool")`."""
        return [torch.float16, torch.bfloat16]


_registered: DeviceModule | None = None
_library: torch.library.Library | None = None


def register(lease: str, workers: list[wire.WorkerAddress]) -> DeviceModule:
    """Make `torch.device("pool")` work in this process; PyTorch lets that happen once."""
    global _registered, _library
    if _registered is not None:
        raise LeaseError("this process has a pool device already")
    module = _registered = DeviceModule(lease, workers)
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, module, _Hook(), backward.Guard())
    _library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    kernels.open_session = module.session
    kernels.current_device = module.current_device
    tensors.is_gpu = module.is_gpu
    kernels.register(_library)
    recurrent.register(_library)
    shims.install(_library)
    sparse.install(_library)
    cuda.install(_library, module)
    parallel.install(module)
    backward.install(len(workers))
    capture.install()
    atexit.register(module.close)
    return module


def _index(device: Any, current: int) -> int:
    if device is None:
        return current
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return current if index is None else index
