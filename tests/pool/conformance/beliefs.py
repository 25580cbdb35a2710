"""Which ops give another dtype, shape or strides than their meta kernels say, over PyTorch's database of operators.

Prints a JSON object: op → what differs ("geometry", "strides", "missing"). No pool is used.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from millpond.pool import codec
from millpond.pool.operators import allowed
from millpond.pool.plan import Op

SAMPLES = 4


class Beliefs(TorchDispatchMode):
    """Compares what every op gives with what its meta kernel says."""

    def __init__(self) -> None:
        super().__init__()
        self.differences: dict[str, set[str]] = defaultdict(set)
        self._ops: dict[Any, Op] = {}

    def __torch_dispatch__(self, overload: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = self._ops.get(overload) or self._ops.setdefault(overload, Op(overload))
        asked = op.name not in allowed() or op.by_value or not all(op.new) or _is_view(overload)
        strided = all(t.layout is torch.strided for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        if not asked and strided:
            believed = self._believe(op, args, kwargs)
        result = overload(*args, **kwargs)
        if not asked and strided and believed is not None:
            self._compare(op.name, tree_leaves(result), tree_leaves(believed))
        return result

    def _believe(self, op: Op, args: Any, kwargs: Any) -> Any:
        try:
            return op.overload(*tree_map(_on_meta, args), **tree_map(_on_meta, kwargs))
        except NotImplementedError:
            self.differences[op.name].add("missing")
        except Exception:
            self.differences[op.name].add("error")
        return None

    def _compare(self, name: str, found: list[Any], believed: list[Any]) -> None:
        if len(found) != len(believed):
            self.differences[name].add("geometry")
            return
        for one, other in zip(found, believed, strict=True):
            if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
                if (one.dtype, one.shape) != (other.dtype, other.shape):
                    self.differences[name].add("geometry")
                elif one.layout is torch.strided and one.stride() != other.stride() and one.numel() > 1:
                    self.differences[name].add("strides")


def _is_view(overload: Any) -> bool:
    return any(value.alias_info is not None for value in overload._schema.returns)


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("meta")
    if not isinstance(value, torch.Tensor):
        return value
    offset = int(value.storage_offset())
    span = codec.extent(tuple(value.shape), value.stride(), offset)
    return torch.empty(span, dtype=value.dtype, device="meta").as_strided(value.shape, value.stride(), offset)


def main() -> None:
    """Run every operator, forward and backward, on the host."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    beliefs = Beliefs()
    for op in op_db:
        if not op.supports_dtype(torch.float32, "cpu"):
            continue
        torch.manual_seed(0)
        samples = op.sample_inputs("cpu", torch.float32, requires_grad=op.supports_autograd)
        for sample in itertools.islice(samples, SAMPLES):
            try:
                with beliefs:
                    results = tree_leaves(op(sample.input, *sample.args, **sample.kwargs))
                    wanting = [t for t in results if isinstance(t, torch.Tensor) and t.requires_grad]
                    if wanting:
                        torch.autograd.backward(wanting, [torch.ones_like(t) for t in wanting])
            except Exception:  # plain CPU cannot do this one
                continue
    print(json.dumps({name: sorted(kinds) for name, kinds in sorted(beliefs.differences.items())}))


if __name__ == "__main__":
    main()
