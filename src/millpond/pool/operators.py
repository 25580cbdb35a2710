"""Which ops a worker runs: those of PyTorch's own `aten` registry, less the ones that reach out of the session.

The list is taken from the registry of the torch at hand, by parsed schema; a name from the wire is only ever looked
up in it.
"""

from __future__ import annotations

import functools
import re

import torch

DENIED = re.compile(
    r"""^aten::(?:
      from_file | _print | .*pin_memory | is_pinned | record_stream                  # files, terminal, host memory
    | .*set_data | set_? | .*resize.* | as_strided_ | _lazy_clone | _efficientzerotensor  # storages: `View` is checked
    | _fw_primal | _make_dual.* | _unpack_dual | _backward | requires_grad_ | retain.*grad | data
    | _version | is_leaf | output_nr                                                 # autograd is the client's
    | .*assert.* | _test_.* | _debug.* | .*sym_.* | _has_same_storage_numel          # a failed one ends a GPU's context
    | fbgemm_.* | .*mkldnn.* | quantized_.* | .*_packed.* | _cslt_.* | .*_int4pack.*  # pointers inside of tensors
    | _nested_.* | to_dense_backward | _cufft_.* | _foobar                           # no form on the wire
    )(?:\..*)?$""",
    re.VERBOSE,
)
"""Ops of `aten` that a worker refuses: they touch files, pointers, storages, autograd's state or a process's."""


@functools.cache
def allowed() -> frozenset[str]:
    """Return the names, such as `aten::add.Tensor`, of all ops that a worker runs."""
    names = torch._C._dispatch_get_all_op_names()
    return frozenset(name for name in names if name.startswith("aten::") and not DENIED.match(name))


def resolve(name: str) -> torch._ops.OpOverload | None:
    """Return the op of that name if it is allowed."""
    if name not in allowed():
        return None
    packet, _, overload = name.removeprefix("aten::").partition(".")
    op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
    return op if isinstance(op, torch._ops.OpOverload) else None


def new_results(op: torch._ops.OpOverload) -> list[bool]:
    """Return, for each result of an op, whether it is new, rather than an operand that was written to."""
    return [not (value.alias_info is not None and value.alias_info.is_write) for value in op._schema.returns]
