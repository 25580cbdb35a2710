"""`torch.accelerator` and `torch.pool`, `torch.Stream` and `torch.Event`: what `torch.cuda` answers, by every name.

PyTorch asks its own C++ for these, which knows no allocator, stream or event of a device that was made in Python.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from millpond.pool import codec, cuda_runtime
from millpond.pool.tensors import DEVICE

_MEMORY = """empty_cache memory_stats memory_allocated max_memory_allocated memory_reserved max_memory_reserved
reset_accumulated_memory_stats reset_peak_memory_stats"""
_MORE_MEMORY = """mem_get_info memory_summary memory_cached max_memory_cached reset_max_memory_allocated
reset_max_memory_cached memory_stats_as_nested_dict host_memory_stats get_allocator_backend
get_per_process_memory_fraction set_per_process_memory_fraction"""


_RANDOM = """get_rng_state get_rng_state_all set_rng_state set_rng_state_all manual_seed manual_seed_all seed seed_all
initial_seed"""


def install(module: Any, meant: Callable[[Any], Any]) -> None:
    """Put all of them in place. `module` is `torch.pool`; `meant` maps a device to the pool's."""
    _add_part(module, "memory", {name: getattr(module, name) for name in f"{_MEMORY} {_MORE_MEMORY}".split()})
    _add_part(module, "random", {name: getattr(module, name) for name in _RANDOM.split()})
    _add_part(module, "streams", {name: getattr(cuda_runtime, name) for name in ("Stream", "Event")})
    _add_part(module, "amp", {"autocast": Autocast, "GradScaler": Scaler, **_CUSTOM})
    owners: list[Any] = [torch.accelerator, torch.accelerator.memory]
    replaced = {name: getattr(cuda_runtime, name) for name in _MEMORY.split()}
    replaced.update(get_memory_info=cuda_runtime.mem_get_info, empty_host_cache=lambda: None)
    for name, value in replaced.items():
        for owner in owners:
            setattr(owner, name, value)
    torch.accelerator.get_device_capability = get_device_capability  # type: ignore[assignment]
    torch.accelerator.current_stream = current_stream  # type: ignore[assignment]
    torch.accelerator.set_stream = set_stream  # type: ignore[assignment]
    torch.Stream = _either(torch.Stream, cuda_runtime.Stream, meant)  # type: ignore[misc,assignment]
    torch.Event = _either(torch.Event, cuda_runtime.Event, meant)  # type: ignore[misc,assignment]
    record_stream = torch.Tensor.record_stream

    @functools.wraps(record_stream)
    def record(tensor: torch.Tensor, stream: Any) -> None:
        if not isinstance(stream, cuda_runtime.Stream):  # on ours all is in order: nothing is to be remembered
            record_stream(tensor, stream)

    torch.Tensor.record_stream = record  # type: ignore[method-assign,assignment]


class Autocast(torch.amp.autocast_mode.autocast):
    """`torch.autocast` for the pool device: `torch.pool.amp.autocast`."""

    def __init__(self, enabled: bool = True, dtype: torch.dtype | None = None, cache_enabled: bool = True) -> None:
        super().__init__(DEVICE, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)


class Scaler(torch.amp.grad_scaler.GradScaler):
    """`torch.amp.GradScaler` for the pool device: `torch.pool.amp.GradScaler`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(DEVICE, *args, **kwargs)


_CUSTOM = {
    name: functools.partial(getattr(torch.amp, name), device_type=DEVICE) for name in ("custom_fwd", "custom_bwd")
}


def _add_part(module: Any, name: str, contents: dict[str, Any]) -> None:
    """Give `torch.pool` a module of its own, as `torch.cuda` has it, that can be imported."""
    part = types.ModuleType(f"torch.{DEVICE}.{name}", f"As `torch.cuda.{name}`, for the pool device.")
    vars(part).update(contents)
    setattr(module, name, part)
    sys.modules[part.__name__] = part


def get_device_capability(device: Any = None, /) -> dict[str, Any]:
    """Return what the device can do: the dtypes that it has."""
    return {"supported_dtypes": set(codec.DTYPE_NAMES)}


def current_stream(device: Any = None, /) -> cuda_runtime.Stream:
    """Return the stream of a device. A function of its own: Dynamo has another rule for that of `torch.cuda`."""
    return cuda_runtime.current_stream(device)


def set_stream(stream: cuda_runtime.Stream, /) -> None:
    """Choose the device of a stream."""
    cuda_runtime.set_stream(stream)


def _either(theirs: Any, ours: type, meant: Callable[[Any], Any]) -> type:
    """Return a class that makes PyTorch's own for other devices, and ours for the pool, or where no device is named."""

    class Kind(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, (theirs, ours))

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, (theirs, ours))

        def __call__(cls, device: Any = None, *args: Any, **kwargs: Any) -> Any:
            where = torch.device(DEVICE, device) if isinstance(device, int) else device
            if where is not None and torch.device(meant(where)).type != DEVICE:
                return theirs(device, *args, **kwargs)
            return ours(where, **kwargs) if ours is cuda_runtime.Stream else ours(**kwargs)

    return Kind(theirs.__name__, (), {"__module__": "torch", "__doc__": theirs.__doc__})
