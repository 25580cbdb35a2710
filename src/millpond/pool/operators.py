"""Which ops a worker runs: those of PyTorch's own `aten` registry that a program's ops come down to, and no others.

The list is taken from the registry of the torch at hand, by parsed schema; a name from the wire is only ever looked
up in it. Besides those denied by name, kinds that no client sends are left out: what makes views (the client does, and
`wire.View` is checked), what changes a tensor's geometry in place, what PyTorch takes apart, and what it makes of other
ops, but for the forms that write to no operand: compiled programs consist of those.
"""

from __future__ import annotations

import functools
import re

import torch

DENIED = re.compile(
    r"""^aten::(?:
      from_file | _print | .*pin_memory | is_pinned | record_stream                  # files, terminal, host memory
    | .*set_data | set_? | .*resize.* | as_strided_ | _lazy_clone | _efficientzerotensor  # storages: `View` is checked
    | _fw_primal.* | _make_dual.* | _unpack_dual | _backward | requires_grad_ | retain.*grad | data
    | _version | is_leaf | output_nr                                                 # autograd is the client's
    | .*assert.* | _test_.* | _debug.* | .*sym_.* | _has_same_storage_numel          # a failed one ends a GPU's context
    | _?fbgemm_.* | .*mkldnn.* | .*_packed.* | _cslt_.* | .*_int4pack.* | .*_int8pack.* | _dyn_quant_.*
    | quantize_.* | .*quantized.* | dequantize | q_.* | qscheme | int_repr           # pointers inside of tensors
    | .*sparse.* | _to_dense | _?coalesced?_? | _spdiags | _spsolve | sspaddmm | hspmm | _nnz | _dim[IV]
    | _?(?:indices|values)(?:_copy)? | .*(?:crow|ccol|row|col)_indices.* | _convert_indices_.* | _validate_.*
    | .*nested.* | .*jagged.* | to_padded_tensor | to_dense_backward                 # layouts: operands are strided
    | _?cudnn_(?!(?:rnn|rnn_backward|init_dropout_state)$).* | _?miopen_.* | .*mps.*
    | _triton_.* | _nnpack.* | .*_overrideable.* | .*xla.* | _cufft_.*
    | _transformer_encoder_.* | _native_multi_head_attention | _weight_norm_.* | _transform_bias_.*
    | _?slow_conv.* | _?conv_depthwise.* | conv_tbc.* | _stack | _compute_linear_combination | _foreach_copy
    | _unsafe_masked_index.*
    | _grid_sampler_2d_cpu_fallback.* | _index_put_impl | _cum(?:max|min)_helper | _logcumsumexp  # parts of others
    | _cholesky_solve_helper                                                         # likewise
    | .*batch_dim | _make_dep_token | _new_zeros_with_same_feature_meta | _copy_from.* | _to_cpu | lift.*
    | (?:lin|log)space\.(?:Tensor|Scalar)_.*                                         # made of numbers that are read
    | _reshape_alias_copy | _neg_view_copy | _conj_copy | _foobar                    # no form on the wire
    )(?:\..*)?$""",
    re.VERBOSE,
)
"""Ops of `aten` that a worker refuses: they touch files, pointers, storages, autograd's state or a process's."""


@functools.cache
def allowed() -> frozenset[str]:
    """Return the names, such as `aten::add.Tensor`, of all ops that a worker runs."""
    names = torch._C._dispatch_get_all_op_names()
    return frozenset(name for name in names if name.startswith("aten::") and not DENIED.match(name) and _arrives(name))


def resolve(name: str) -> torch._ops.OpOverload | None:
    """Return the op of that name if it is allowed."""
    return _look_up(name) if name in allowed() else None


def new_results(op: torch._ops.OpOverload) -> list[bool]:
    """Return, for each result of an op, whether it is new, rather than an operand that was written to."""
    return [not (value.alias_info is not None and value.alias_info.is_write) for value in op._schema.returns]


def _look_up(name: str) -> torch._ops.OpOverload | None:
    packet, _, overload = name.removeprefix("aten::").partition(".")
    op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
    return op if isinstance(op, torch._ops.OpOverload) else None


def _arrives(name: str) -> bool:
    """Return whether a client can come to send an op: not if it makes a view, consists of others, or is their `out`."""
    op = _look_up(name)
    return (
        op is not None
        and torch.Tag.inplace_view not in op.tags
        and not (torch.Tag.generated in op.tags and op._schema.is_mutable)
        and not any(value.alias_info is not None and not value.alias_info.is_write for value in op._schema.returns)
        and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    )
