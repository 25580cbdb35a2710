"""`torch.accelerator` and `torch.pool`, `torch.Stream` and `torch.Event`: what `torch.cuda` answers, by every name.

PyTorch asks its own C++ for these, which knows no allocator, stream or event of a device that was made in Python.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from millpond.pool import codec, cuda_runtime
from millpond.pool.tensors import DEVICE

_MEMORY = """empty_cache memory_stats memory_allocated max_memory_allocated memory_reserved max_memory_reserved
reset_accumulated_memory_stats reset_peak_memory_stats"""


def install(meant: Callable[[Any], Any]) -> None:
    """Put all of them in place. `meant` maps a device to the pool's."""
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
