"""`torch.cuda`, answered by the pool: devices, memory, random numbers, streams, events.

What would need the CUDA runtime in this process (raw memory, graphs of a driver, extensions) says so at once.
"""

# What has no docstring here has PyTorch's, and does what that says.
# ruff: noqa: D102, D103

from __future__ import annotations

import contextlib
import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from millpond.pool.errors import NeedsCuda
from millpond.pool.tensors import DEVICE

_pool: Any
"""`torch.pool`."""
_meant: Callable[[Any], Any]
_shown: Callable[[torch.device], torch.device]

_NEEDS_CUDA = """cudart ipc_collect_handles caching_allocator_alloc caching_allocator_delete caching_allocator_enable
change_current_allocator memory_snapshot get_stream_from_external current_blas_handle current_solver_handle
make_graphed_callables graph_pool_handle set_sync_debug_mode utilization temperature power_draw clock_rate memory_usage
device_memory_used list_gpu_processes _sleep _compile_kernel use_mem_pool"""
_CLASSES_THAT_NEED_CUDA = "CUDAGraph graph ExternalStream MemPool CUDAPluggableAllocator"


def install(module: Any, meant: Callable[[Any], Any], shown: Callable[[torch.device], torch.device]) -> None:
    """Replace the functions of `torch.cuda`.

    `module` is `torch.pool`; `meant` maps a device to the pool's, `shown` one of the pool to what the program calls it.
    """
    global _pool, _meant, _shown
    _pool, _meant, _shown = module, meant, shown
    owners: list[Any] = [torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.streams, torch.cuda.graphs]
    replaced = {name: value for name, value in globals().items() if name in NAMES}
    replaced.update({name: _refuse(name) for name in _NEEDS_CUDA.split()})
    for name in _CLASSES_THAT_NEED_CUDA.split():  # classes still: programs name them in annotations
        replaced[name] = type(name, (), {"__new__": _refuse(name), "__module__": "torch.cuda"})
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
        for owner in owners[1:]:
            if hasattr(owner, name):
                setattr(owner, name, value)
    torch.cuda._initialized = True  # else checkpointing would not keep the device's random numbers
    torch.cuda._lazy_init = torch.cuda.init = torch.cuda.ipc_collect = _nothing
    torch.cuda._lazy_call = lambda callable, **kwargs: callable()
    torch.cuda._is_in_bad_fork = module._is_in_bad_fork
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.backends.cuda.is_built = is_available
    for name in ("_cuda_CUDAAllocator_AllocatorState", "_set_cached_tensors_enabled"):
        if not hasattr(torch._C, name):  # PyTorch's compiler imports them where CUDA is built in
            setattr(torch._C, name, _nothing)
    torch.backends.cudnn.is_acceptable = lambda tensor: False
    for name in ("range_push", "range_pop", "range_start", "range_end", "mark"):
        setattr(torch.cuda.nvtx, name, _nothing)
    torch.cuda.nvtx.range = _no_range
    for name, dtype in _LEGACY.items():
        setattr(torch.cuda, name, _legacy_class(name, dtype))


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do what is right here: nothing."""


@contextlib.contextmanager
def _no_range(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NeedsCuda(f"torch.cuda.{name}", "Leave it out under millpond pool run, or run on the GPU's own machine.")

    return refuse


def _index(device: Any) -> int:
    """Return a device's index."""
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device if device >= 0 else current_device()
    named = _meant(torch.device(device))
    if named.type != DEVICE:
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return current_device() if named.index is None else int(named.index)


# --- devices -------------------------------------------------------------------------------------------------------


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def is_bf16_supported(including_emulation: bool = True) -> bool:
    return True


def is_tf32_supported() -> bool:
    return get_device_capability()[0] >= 8


def is_current_stream_capturing() -> bool:
    return False


def device_count() -> int:
    return _pool.device_count()  # type: ignore[no-any-return]


def current_device() -> int:
    return _pool.current_device()  # type: ignore[no-any-return]


def set_device(device: Any) -> None:
    index = _index(device)
    if not isinstance(device, int) or device >= 0:
        _pool.set_device(index)


class device:
    """Choose a device for the length of a `with` block."""

    def __init__(self, device: Any) -> None:
        self.idx = -1 if device is None or device == -1 else _index(device)
        self.prev_idx = -1

    def __enter__(self) -> None:
        self.prev_idx = _pool.current_device()
        if self.idx >= 0:
            _pool.set_device(self.idx)

    def __exit__(self, *exc: object) -> None:
        _pool.set_device(self.prev_idx)


class device_of(device):
    """Choose the device of a tensor, if it is on one."""

    def __init__(self, obj: Any) -> None:
        super().__init__(obj.get_device() if obj.is_cuda else -1)


def get_device_name(device: Any = None) -> str:
    return _pool.get_device_name(_index(device))  # type: ignore[no-any-return]


def get_device_capability(device: Any = None) -> tuple[int, int]:
    major, minor = _pool.usage(_index(device)).capability
    return major, minor


def get_device_properties(device: Any = None) -> Any:
    index = _index(device)
    about = _pool.usage(index)
    return SimpleNamespace(
        name=get_device_name(index),
        major=about.capability[0],
        minor=about.capability[1],
        total_memory=about.limit_bytes,
        multi_processor_count=max(1, about.processors),  # programs divide by it
        is_integrated=0,
        is_multi_gpu_board=0,
        warp_size=32,
        gcnArchName="",
    )


def get_arch_list() -> list[str]:
    return []


def get_gencode_flags() -> str:
    return ""


def can_device_access_peer(device: Any, peer_device: Any) -> bool:
    return _index(device) != _index(peer_device)


def synchronize(device: Any = None) -> None:
    _pool.synchronize(_index(device))


# --- memory: the lease's, as the worker counts it. It keeps no cache of its own: what is reserved is in use ----------


def memory_allocated(device: Any = None) -> int:
    return _pool.usage(_index(device)).used_bytes  # type: ignore[no-any-return]


def max_memory_allocated(device: Any = None) -> int:
    return _pool.usage(_index(device)).peak_bytes  # type: ignore[no-any-return]


memory_reserved = memory_cached = memory_allocated
max_memory_reserved = max_memory_cached = max_memory_allocated


def mem_get_info(device: Any = None) -> tuple[int, int]:
    return _pool.mem_get_info(_index(device))  # type: ignore[no-any-return]


def reset_peak_memory_stats(device: Any = None) -> None:
    _pool.reset_peak_memory_stats(_index(device))


reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats


def reset_accumulated_memory_stats(device: Any = None) -> None:
    """Do nothing: nothing is accumulated."""


def memory_stats(device: Any = None) -> dict[str, int]:
    usage = _pool.usage(_index(device))
    kinds = ("allocated_bytes", "reserved_bytes", "active_bytes")
    pools = ("all", "small_pool", "large_pool")
    now, peak = usage.used_bytes, usage.peak_bytes
    stats = {"num_ooms": 0, "num_alloc_retries": 0}
    for kind in kinds:
        for pool in pools:
            of_pool = (now, peak) if pool != "small_pool" else (0, 0)
            stats[f"{kind}.{pool}.current"], stats[f"{kind}.{pool}.peak"] = of_pool
    return stats


def memory_stats_as_nested_dict(device: Any = None) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in memory_stats(device).items():
        *path, last = name.split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return nested


def host_memory_stats() -> dict[str, int]:
    """Return nothing: pinned memory is as any other of the host's here."""
    return {}


def reset_peak_host_memory_stats() -> None:
    """Do nothing: nothing is counted."""


reset_accumulated_host_memory_stats = reset_peak_host_memory_stats


def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    usage = _pool.usage(_index(device))
    return (
        f"Pool device {_index(device)} ({get_device_name(device)}): {usage.used_bytes} bytes in use, "
        f"{usage.peak_bytes} at most, {usage.limit_bytes} in the lease"
    )


def empty_cache() -> None:
    _pool.empty_cache()


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    if fraction < 1:
        warnings.warn(
            "the pool's lease sets how much memory there is, not this program: millpond pool run --memory",
            stacklevel=2,
        )


def get_per_process_memory_fraction(device: Any = None) -> float:
    return 1.0


def get_allocator_backend() -> str:
    return "native"


# --- random numbers ------------------------------------------------------------------------------------------------


def manual_seed(seed: int) -> None:
    _pool.manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    _pool.manual_seed_all(int(seed))


def seed() -> None:
    manual_seed(secrets.randbits(53))


def seed_all() -> None:
    manual_seed_all(secrets.randbits(53))


def initial_seed() -> int:
    return _pool.initial_seed()  # type: ignore[no-any-return]


def get_rng_state(device: Any = None) -> torch.Tensor:
    return _pool.get_rng_state(_index(device))  # type: ignore[no-any-return]


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state(index) for index in range(device_count())]


def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    _pool.set_rng_state(new_state, _index(device))


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


# --- streams and events: the worker runs a session's ops in one order, so that all streams are the same one -----------


class Stream:
    """A stream. Ops of all streams of a device run in the order of the program."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device_index = _index(device)
        self.priority = priority
        self.stream_id = self.cuda_stream = 0

    @property
    def device(self) -> torch.device:
        return _shown(torch.device(DEVICE, self.device_index))

    def __enter__(self) -> Stream:
        self._before = current_device()
        set_stream(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _pool.set_device(self._before)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.device_index == self.device_index

    def __hash__(self) -> int:
        return hash(self.device_index)

    def query(self) -> bool:
        self.synchronize()
        return True

    def is_capturing(self) -> bool:
        return False

    def synchronize(self) -> None:
        synchronize(self.device_index)

    def wait_event(self, event: Event) -> None:
        """Do nothing: what the event follows is before what comes now."""

    def wait_stream(self, stream: Stream) -> None:
        """Wait for another device's stream; on the same device there is nothing to wait for."""
        if stream.device_index != self.device_index:
            stream.synchronize()

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event


class Event:
    """A point in the program. One that measures time waits for the worker to get there, and so costs a round trip."""

    def __init__(
        self,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> None:
        if interprocess:
            raise NeedsCuda("an event that other processes share", "Leave out interprocess=True.")
        self.enable_timing = enable_timing
        self.reached_s: float | None = None
        self._device: int | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._device = stream.device_index if stream is not None else current_device()
        if self.enable_timing:
            synchronize(self._device)
            self.reached_s = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Do nothing: what comes after runs after."""

    def query(self) -> bool:
        self.synchronize()
        return True

    def synchronize(self) -> None:
        if self._device is not None:
            synchronize(self._device)

    def elapsed_time(self, end_event: Event) -> float:
        """Return the milliseconds between when the worker got to the one event and to the other."""
        if not (self.enable_timing and end_event.enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.reached_s is None or end_event.reached_s is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return (end_event.reached_s - self.reached_s) * 1000


def current_stream(device: Any = None) -> Stream:
    return Stream(device)


default_stream = current_stream


def set_stream(stream: Stream | None) -> None:
    if stream is not None:
        _pool.set_device(stream.device_index)


class StreamContext:
    """Choose the device of a stream for the length of a `with` block."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream
        self._device = device(stream.device_index if stream is not None else None)

    def __enter__(self) -> None:
        self._device.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._device.__exit__(*exc)


def stream(stream: Stream | None) -> StreamContext:
    return StreamContext(stream)


NAMES = frozenset(
    name
    for name, value in list(globals().items())
    if not name.startswith("_") and getattr(value, "__module__", "") == __name__ and name not in ("install",)
)
"""What is defined above goes into `torch.cuda` under the same name."""


# --- legacy tensors: torch.cuda.FloatTensor ------------------------------------------------------------------------

_LEGACY = {
    "FloatTensor": torch.float32,
    "DoubleTensor": torch.float64,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "LongTensor": torch.int64,
    "IntTensor": torch.int32,
    "ShortTensor": torch.int16,
    "CharTensor": torch.int8,
    "ByteTensor": torch.uint8,
    "BoolTensor": torch.bool,
}


class _Legacy(type):
    dtype: torch.dtype

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch.Tensor) and instance.is_cuda and instance.dtype == cls.dtype

    def __call__(cls, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Make one: of sizes, uninitialized; of a sequence or a tensor, with its values."""
        if len(args) == 1 and not isinstance(args[0], (int, torch.Size)):
            return torch.as_tensor(args[0], dtype=cls.dtype).cuda()
        sizes = args[0] if len(args) == 1 and isinstance(args[0], torch.Size) else args
        return torch.empty(sizes or (0,), dtype=cls.dtype, device="cuda")


def _legacy_class(name: str, dtype: torch.dtype) -> type:
    return _Legacy(name, (), {"dtype": dtype, "__module__": "torch.cuda"})


def legacy_type(kind: Any) -> torch.dtype | None:
    """Return the dtype of `torch.cuda.FloatTensor`, given as a class or by name; None for anything else."""
    if isinstance(kind, _Legacy):
        return kind.dtype
    if isinstance(kind, str) and kind.startswith("torch.cuda."):
        return _LEGACY.get(kind.removeprefix("torch.cuda."))
    return None
