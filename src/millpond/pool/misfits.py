"""Operands that do not fit their op, where PyTorch's meta kernel for it does not look: so that the error comes at once.

Whatever is raised here is only a doubt. The worker is then asked, and says in the op's own words what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensor = torch.Tensor
aten = torch.ops.aten

MASKS = (torch.bool, torch.uint8)
"""Dtypes of indices of which the values decide how many there are."""


def check(op: torch._ops.OpOverload, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise any exception if the operands of an op, as meta tensors, may not fit it."""
    if (doubt := _DOUBTS.get(name)) is not None:
        doubt(*args, **kwargs)
    if torch.Tag.pointwise in op.tags and op._schema.name.endswith("_"):
        _in_place(*args)
    for place, formal in enumerate(op._schema.arguments):
        if formal.alias_info is not None and formal.alias_info.is_write:
            _written(args[place] if place < len(args) else kwargs.get(formal.name))


def _written(target: Any) -> None:
    if isinstance(target, Tensor) and any(
        size > 1 and step == 0 for size, step in zip(target.shape, target.stride(), strict=True)
    ):
        raise RuntimeError("several elements in one place are written to")


def _in_place(target: Tensor, *operands: Any, **_options: Any) -> None:
    for operand in operands:
        if isinstance(operand, Tensor):
            operand.expand(target.shape)


def _index(target: Tensor, places: Sequence[Tensor | None]) -> Tensor:
    """Return what indexing finds."""
    found: Tensor = aten.index.Tensor(target, places)
    sizes = [target.size(place) for place, index in enumerate(places) if index is not None]
    if 0 in sizes and all(index is None or index.numel() for index in places):
        raise IndexError("an index into nothing")
    return found


def _index_put(target: Tensor, indices: Sequence[Tensor | None], values: Tensor, *_: Any, **_options: Any) -> None:
    places: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in MASKS:
            places.append(index)
        elif index.dtype is torch.uint8 or index.shape != target.shape[len(places) :][: index.dim()]:
            raise IndexError("a mask of another shape than what it is for, or one of bytes")
        else:
            places += [index.new_empty((1,), dtype=torch.int64)] * index.dim()
    found = _index(target, places)
    if values.dtype != target.dtype:
        raise RuntimeError("values of another dtype")
    if len(places) == len(indices) and not any(index is not None and index.dtype in MASKS for index in indices):
        values.expand(found.shape)


def _alpha(x: Any, other: Any, *_: Any, alpha: Any = 1, **_out: Any) -> None:
    dtype = torch.result_type(x, other)
    fits = {bool: dtype is torch.bool, float: dtype.is_floating_point or dtype.is_complex, complex: dtype.is_complex}
    if not fits.get(type(alpha), True):
        raise RuntimeError("a factor of another kind than what it is for")


def _masked_scatter(target: Tensor, mask: Tensor, source: Tensor, *_: Any) -> None:
    mask.expand(target.shape)
    if source.dtype != target.dtype or mask.dtype is not torch.bool:
        raise RuntimeError("numbers of another dtype, or a mask that is none")


_DOUBTS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("aten::index.Tensor", "aten::_unsafe_index.Tensor"), _index),
    **dict.fromkeys(("aten::index_put", "aten::index_put_"), _index_put),
    **dict.fromkeys(("aten::_unsafe_index_put", "aten::_index_put_impl_"), _index_put),
    **{f"aten::{name}{form}": _alpha for name in ("add", "sub") for form in (".Tensor", "_.Tensor", ".out")},
    "aten::rsub.Tensor": _alpha,
    **{f"aten::{name}_.Tensor": _in_place for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "aten::masked_scatter_": _masked_scatter,
}
