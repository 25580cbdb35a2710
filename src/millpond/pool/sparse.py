"""Sparse COO tensors of the pool device: PyTorch's own, over indices and values that are tensors of the pool.

What embeddings' gradients and sparse products need is done on the device. All else that PyTorch can do with them goes
through the host's memory: right, and slow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from millpond.pool.tensors import DEVICE, device_of

Tensor = torch.Tensor
aten = torch.ops.aten

_SPARSE_CPU = torch._C.DispatchKey.SparseCPU
_KEY = "SparsePrivateUse1"

ABOUT = """_sparse_coo_tensor_with_dims _sparse_coo_tensor_with_dims_and_tensors _indices _values indices values _nnz
sparse_dim dense_dim _dimI _dimV is_coalesced _coalesced_ empty.memory_format copy_ copy_sparse_to_sparse_
sparse_resize_ sparse_resize_and_clear_ resize_as_sparse_ zero_"""
"""Ops that look at the two tensors and not into them, so that PyTorch's kernels for the host do."""
LINEAR = "mul.Tensor mul.Scalar div.Tensor div.Scalar neg"
"""Ops that act on each value by itself and keep zero."""
LINEAR_IN_PLACE = "mul_.Tensor mul_.Scalar div_.Tensor div_.Scalar neg_"


def install(library: torch.library.Library) -> None:
    """Give sparse tensors of the pool their kernels."""
    own: dict[str, Callable[..., Any]] = {
        **{name: functools.partial(_overload(name)._op_dk, _SPARSE_CPU) for name in ABOUT.split()},
        **{name: _on_values(_overload(name)) for name in LINEAR.split()},
        **{name: _on_values_in_place(_overload(name)) for name in LINEAR_IN_PLACE.split()},
        "clone": clone,
        "_coalesce": coalesce,
        "_to_dense": to_dense,
        "_to_copy": to_copy,
        "add.Tensor": add,
        "add_.Tensor": add_,
        "mm": mm,
        "_sparse_mm": mm,
        "addmm": addmm,
        "_sparse_addmm": addmm,
        "sparse_mask": sparse_mask,
    }
    for name, kernel in own.items():
        library.impl(name, kernel, _KEY)  # type: ignore[no-untyped-call]
    library.impl("_to_copy", from_host, "SparseCPU")  # type: ignore[no-untyped-call]
    for name, kernel in (("_to_sparse", to_layout), ("_to_sparse.sparse_dim", to_sparse)):
        library.impl(name, kernel, "PrivateUse1")  # type: ignore[no-untyped-call]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for full in torch._C._dispatch_get_all_op_names():
        name = full.removeprefix("aten::")
        if name != full and name not in own and has(full, "SparseCPU") and not has(full, "CompositeImplicitAutograd"):
            library.impl(name, _on_host(_overload(name)), _KEY)  # type: ignore[no-untyped-call]


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _make(indices: Tensor, values: Tensor, like: Tensor, coalesced: bool) -> Tensor:
    made: Tensor = aten._sparse_coo_tensor_with_dims_and_tensors(
        like.sparse_dim(),
        like.dense_dim(),
        like.shape,
        indices,
        values,
        dtype=values.dtype,
        layout=torch.sparse_coo,
        device=device_of(values),
        is_coalesced=coalesced,
    )
    return made


def _on_values(op: Any) -> Callable[..., Any]:
    general = _on_host(op)

    def run(tensor: Any, *args: Any) -> Any:
        if any(isinstance(a, Tensor) and (a.dim() or a.layout is not torch.strided) for a in args) or not (
            isinstance(tensor, Tensor) and tensor.layout is torch.sparse_coo
        ):
            return general(tensor, *args)
        return _make(tensor._indices(), op(tensor._values(), *args), tensor, tensor.is_coalesced())

    return run


def _on_values_in_place(op: Any) -> Callable[..., Any]:
    def run(tensor: Tensor, *args: Any) -> Tensor:
        if any(isinstance(a, Tensor) and a.dim() for a in args):
            raise NotImplementedError(f"{op} does not write to sparse tensors on the pool device")
        op(tensor._values(), *args)
        return tensor

    return run


def clone(tensor: Tensor, *, memory_format: Any = None) -> Tensor:
    """`clone`."""
    return _make(tensor._indices().clone(), tensor._values().clone(), tensor, tensor.is_coalesced())


def _flat(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """Return the place of each value among the sparse dimensions laid out in a row, and their strides."""
    indices = tensor._indices()
    strides = [math.prod(tensor.shape[d + 1 : tensor.sparse_dim()]) for d in range(tensor.sparse_dim())]
    nowhere = indices.new_zeros(indices.size(1))  # what has no sparse dimension has one place
    return sum((indices[d] * stride for d, stride in enumerate(strides)), nowhere), strides


def coalesce(tensor: Tensor) -> Tensor:
    """`coalesce`: one value for each place, in order."""
    values = tensor._values()
    flat, strides = _flat(tensor)
    places, of_place = torch.unique(flat, return_inverse=True)
    summed = values.new_zeros((places.numel(), *values.shape[1:])).index_add_(0, of_place, values)
    rows = [places // stride % size for stride, size in zip(strides, tensor.shape, strict=False)]
    indices = torch.stack(rows) if rows else tensor._indices().new_empty(0, places.numel())
    return _make(indices, summed, tensor, True)


def _at(tensor: Tensor, indices: Tensor) -> Tensor:
    """Return what a dense tensor has at places; without a sparse dimension each place is all of it."""
    return tensor[tuple(indices)] if len(indices) else tensor.repeat(indices.size(1), *[1] * tensor.dim())


def _put(tensor: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Add values to a dense tensor at their places, in place."""
    if not len(indices):
        return tensor.add_(values.sum(0))
    return tensor.index_put_(tuple(indices), values, accumulate=True)


def to_dense(tensor: Tensor, dtype: torch.dtype | None = None, masked_grad: bool | None = None) -> Tensor:
    """`to_dense`."""
    values = tensor._values() if dtype is None else tensor._values().to(dtype)
    return _put(values.new_zeros(tensor.shape), tensor._indices(), values)


def to_copy(tensor: Tensor, **options: Any) -> Tensor:
    """`to`: another dtype, or to the host."""
    where = options.get("device") or device_of(tensor)
    moved = [part.to(where, copy=True) for part in (tensor._indices(), tensor._values())]
    values = moved[1].to(options.get("dtype") or tensor.dtype)
    if where.type == DEVICE:
        return _make(moved[0], values, tensor, tensor.is_coalesced())
    return torch.sparse_coo_tensor(
        moved[0], values, tensor.shape, check_invariants=False, is_coalesced=tensor.is_coalesced()
    )


def from_host(tensor: Tensor, **options: Any) -> Tensor:
    """`to` of a sparse tensor in the host's memory."""
    if (device := options.get("device")) is not None and device.type == DEVICE:
        values = tensor._values().to(device, options.get("dtype") or tensor.dtype)
        return _make(tensor._indices().to(device), values, tensor, tensor.is_coalesced())
    copied: Tensor = aten._to_copy.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, tensor, **options)
    return copied


def add(left: Tensor, right: Tensor, *, alpha: Any = 1) -> Tensor:
    """`left + alpha * right`, of which at least one is sparse."""
    if left.layout is torch.strided:
        return add_(left.clone(), right, alpha=alpha)
    if right.layout is torch.strided:
        return add_(right * alpha, left)
    dtype = torch.promote_types(left.dtype, right.dtype)
    indices = torch.cat([left._indices(), right._indices()], 1)
    values = torch.cat([left._values().to(dtype), (right._values() * alpha).to(dtype)])
    return _make(indices, values, left, False)


def add_(left: Tensor, right: Tensor, *, alpha: Any = 1) -> Tensor:
    """`left += alpha * right`, a sparse one onto a dense or a sparse one (as a second backward pass does)."""
    if right.layout is not torch.sparse_coo:
        raise NotImplementedError("a dense tensor cannot be added to a sparse one in place; write a = a + b")
    if left.layout is torch.sparse_coo:
        return left.copy_(add(left, right, alpha=alpha))
    values = (right._values() * alpha).to(left.dtype)
    return _put(left, right._indices(), values)


def mm(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, a sparse matrix and a dense one."""
    if left.layout is not torch.sparse_coo or right.layout is not torch.strided:
        result: Tensor = _on_host(aten.mm.default)(left, right)
        return result
    rows, columns = left._indices()
    products: Tensor = left._values().unsqueeze(1) * right[columns]
    return products.new_zeros(left.shape[0], right.shape[1]).index_add_(0, rows, products)


def addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """`beta * bias + alpha * left @ right`."""
    result: Tensor = bias * beta + mm(left, right) * alpha
    return result


def sparse_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return the values of a dense tensor at the places that `mask` has."""
    if tensor.layout is not torch.strided:
        tensor = to_dense(tensor)
    return _make(mask._indices().clone(), _at(tensor, mask._indices()), mask, mask.is_coalesced())


def to_sparse(tensor: Tensor, sparse_dim: int) -> Tensor:
    """Return the values of a dense tensor that are not zero; what is below `sparse_dim` dimensions stays dense."""
    if not min(tensor.dim(), 1) <= sparse_dim <= tensor.dim():
        raise RuntimeError(f"sparse_dim must be in 1..{tensor.dim()} (0 for a number), but is {sparse_dim}")
    there = tensor != 0
    if sparse_dim < tensor.dim():
        there = there.flatten(sparse_dim).any(-1)
    indices = there.nonzero().t().contiguous()
    values = _at(tensor, indices)
    options = {"dtype": tensor.dtype, "device": device_of(tensor), "layout": torch.sparse_coo, "is_coalesced": True}
    made: Tensor = aten._sparse_coo_tensor_with_dims_and_tensors(
        sparse_dim, tensor.dim() - sparse_dim, tensor.shape, indices, values, **options
    )
    return made


def to_layout(tensor: Tensor, *, layout: Any = None, blocksize: Any = None, dense_dim: int | None = None) -> Tensor:
    """`to_sparse`, to a layout, of which COO is here."""
    if layout not in (None, torch.sparse_coo):
        raise NotImplementedError(f"the pool device has sparse tensors of layout sparse_coo, and none of {layout}")
    return to_sparse(tensor, tensor.dim() - (dense_dim or 0))


def _on_host(op: Any) -> Callable[..., Any]:
    """Return a kernel that computes in the host's memory."""
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)

    def run(*args: Any, **kwargs: Any) -> Any:
        if writes:
            raise NotImplementedError(f"{op} does not write to sparse tensors on the pool device")
        devices: list[torch.device] = []

        def bring(value: Any) -> Any:
            if isinstance(value, Tensor) and device_of(value).type == DEVICE:
                devices.append(device_of(value))
                return value.cpu()
            return torch.device("cpu") if isinstance(value, torch.device) else value

        result = op(*tree_map(bring, args), **tree_map(bring, kwargs))
        return tree_map(lambda value: value.to(devices[0]) if isinstance(value, Tensor) else value, result)

    return run
