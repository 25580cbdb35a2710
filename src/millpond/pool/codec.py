"""PyTorch's values as the wire's, and back: dtypes, layouts, memory formats, numbers, geometries.

Names are looked up in closed tables made here; a name that is not in them raises `WireError`.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch

from millpond.pool import wire
from millpond.pool.errors import WireError

MAX_ELEMENTS = 2**48
"""Elements of one tensor, stride 0 included."""

Number = bool | int | float | complex
V = TypeVar("V")


def _by_name(kind: type[V]) -> dict[str, V]:
    return {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, kind)}


DTYPES: dict[str, torch.dtype] = {
    name: dtype for name, dtype in _by_name(torch.dtype).items() if not name.startswith(("qint", "quint"))
}
"""Without the quantized ones: a quantizer has no form on the wire, and PyTorch crashes where one is missing."""
LAYOUTS: dict[str, torch.layout] = _by_name(torch.layout)
MEMORY_FORMATS: dict[str, torch.memory_format] = _by_name(torch.memory_format)
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype(name: str) -> torch.dtype:
    """Return the dtype of that name."""
    return _look_up(DTYPES, name, "dtype")


def symbol(value: torch.dtype | torch.layout | torch.memory_format | torch.device) -> wire.Symbol:
    """Return the symbol for a constant of PyTorch's."""
    if isinstance(value, torch.dtype):
        return wire.Symbol("dtype", DTYPE_NAMES[value])
    if isinstance(value, torch.layout):
        return wire.Symbol("layout", str(value).removeprefix("torch."))
    if isinstance(value, torch.memory_format):
        return wire.Symbol("memory_format", str(value).removeprefix("torch."))
    return wire.Symbol("device")


def from_symbol(
    value: wire.Symbol, device: torch.device
) -> torch.dtype | torch.layout | torch.memory_format | torch.device:
    """Return what a symbol stands for; the device is `device`."""
    if value.kind == "dtype":
        return dtype(value.name)
    if value.kind == "layout":
        return _look_up(LAYOUTS, value.name, "layout")
    if value.kind == "memory_format":
        return _look_up(MEMORY_FORMATS, value.name, "memory format")
    return device


def number(value: Number) -> wire.Number:
    """Return a number as the wire carries it."""
    if isinstance(value, complex):
        return wire.Complex(value.real, value.imag)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return wire.BigInt(str(value))
    return value


def from_number(value: wire.Number) -> Number:
    """Return a number from the wire."""
    if isinstance(value, wire.Complex):
        return complex(value.real, value.imag)
    if isinstance(value, wire.BigInt):
        return int(value.text)
    return value


def geometry(tensor: torch.Tensor) -> wire.Geometry:
    """Return dtype, sizes and strides of a tensor."""
    return wire.Geometry(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.stride())


def extent(sizes: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> int:
    """Return how many elements of a storage a view reaches into.

    Raises:
        WireError: sizes and strides do not belong together, or are more than any tensor has.
    """
    if len(sizes) != len(strides) or math.prod(sizes) > MAX_ELEMENTS:
        raise WireError(f"sizes {list(sizes)} with strides {list(strides)} are no tensor's")
    return span(sizes, strides, offset)


def span(sizes: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> int:
    """Return how many elements of a storage a view reaches into, for one that is known to be a tensor's."""
    if 0 in sizes:
        return 0
    return offset + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def _look_up(table: dict[str, V], name: str, kind: str) -> V:
    try:
        return table[name]
    except KeyError:
        raise WireError(f"{name[:64]!r} is no {kind}") from None
