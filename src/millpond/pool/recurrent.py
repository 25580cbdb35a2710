"""Recurrent layers by cuDNN where the worker has a GPU: PyTorch asks for that by the name of CUDA, and not for a pool.

Elsewhere PyTorch composes them of a few ops for each step, here as on the worker's own CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils._pytree import tree_map_only

from millpond.pool.tensors import DEVICE, device_of, is_on_gpu, remote_of

Tensor = torch.Tensor
aten = torch.ops.aten

MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}
"""The kinds of layers, as cuDNN numbers them (`cudnnRNNMode_t`)."""
DTYPES = (torch.float32, torch.float16, torch.float64)
"""What PyTorch gives to cuDNN."""

_dropout_states: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
"""By session: what cuDNN draws its dropout from, made once, as it takes long."""


def register(library: torch.library.Library) -> None:
    """Give all kinds of recurrent layers, over padded and over packed sequences, a kernel for the pool device."""
    for name, mode in MODES.items():
        for overload in ("input", "data"):
            kernel = _kernel(getattr(getattr(aten, name), overload), mode)
            for key in ("PrivateUse1", "AutogradPrivateUse1"):
                library.impl(f"{name}.{overload}", kernel, key)  # type: ignore[no-untyped-call]


def _kernel(op: torch._ops.OpOverload, mode: int) -> Callable[..., Any]:
    composed, key = op._op_dk, torch._C.DispatchKey.CompositeImplicitAutograd
    is_packed = op._schema.overload_name == "data"

    def run(data: Tensor, *rest: Any) -> Any:
        casts = torch.is_autocast_enabled(DEVICE)
        dtype = torch.get_autocast_dtype(DEVICE) if casts else data.dtype
        if not is_on_gpu(data) or not torch._C._get_cudnn_enabled() or dtype not in DTYPES or not data.numel():
            return composed(key, data, *rest)
        if is_packed:
            sizes, *rest = rest  # type: ignore[assignment]
            batch_sizes, batch_first = sizes.tolist(), False
        else:
            *rest, batch_first = rest  # type: ignore[assignment]
            batch_sizes = []
        if casts:
            data, *rest = tree_map_only(Tensor, lambda x: x.to(dtype), (data, *rest))
        return _by_cudnn(mode, data, batch_sizes, *rest, batch_first=batch_first)

    return run


def _by_cudnn(
    mode: int,
    data: Tensor,
    batch_sizes: list[int],
    hidden: Any,
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    *,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Call the kernel as PyTorch does (`_cudnn_impl` in ATen/native/cudnn/RNN.cpp)."""
    state, cell = hidden if mode == MODES["lstm"] else (hidden, None)
    size = (state if cell is None else cell).shape[2]
    projected = state.shape[2] if state.shape[2] != size else 0
    output, last_state, last_cell, *_ = aten._cudnn_rnn(
        data,
        weights,
        (4 if has_biases else 2) + (projected != 0),
        None,
        state,
        cell,
        mode,
        size,
        projected,
        layers,
        batch_first,
        dropout,
        train,
        bidirectional,
        batch_sizes,
        _dropout_state(data) if dropout and train else None,
    )
    return (output, last_state) if cell is None else (output, last_state, last_cell)


def _dropout_state(alike: Tensor) -> Tensor:
    remote = remote_of(alike)
    assert remote is not None
    state = _dropout_states.get(remote.session)
    if state is None:
        seed = int(torch.empty((), dtype=torch.int64).random_())
        state = aten._cudnn_init_dropout_state(0.5, True, seed, dtype=torch.uint8, device=device_of(alike))
        _dropout_states[remote.session] = state
    return state
