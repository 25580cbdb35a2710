"""A worker whose CPU says that it is a GPU, has kernels that PyTorch has on GPUs only, and records graphs as they do.

The kernels compute by PyTorch's plain attention, and look as those of a GPU do: what they return, in which memory
layout, and what they ask of their operands. Which one it would choose goes by the dtype: bfloat16 (unmasked) the flash
kernel, float32 the efficient one, float64 and dropout none. Started as a worker is: `python stand_in_gpu.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from millpond.pool import graphs, worker
from millpond.pool.executor import bytes_of
from millpond.pool.sessions import Greeting

NAME = "Stand-in GPU"
Tensor = torch.Tensor
aten = torch.ops.aten


def choice(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0, *_: Any, **_more: Any
) -> int:
    if dropout_p or query.dtype is torch.float64:
        return 0
    return 1 if query.dtype is torch.bfloat16 and mask is None else 2


def in_layout_of_gpus(out: Tensor) -> Tensor:
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    return aten._scaled_dot_product_attention_math(query, key, value, bias, 0.0, causal, scale=scale)[0]


def gradients(grad: Tensor, inputs: list[Tensor | None], causal: bool, scale: float | None) -> list[Tensor | None]:
    with torch.inference_mode(False), torch.enable_grad():
        own = [None if x is None else x.clone().requires_grad_() for x in inputs]
        out = plain(*own, causal, scale)
        wanted = [x for x in own if x is not None]
        found = iter(torch.autograd.grad(out, wanted, grad.clone()))
        return [None if x is None else next(found) for x in own]


def efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    learns: bool,
    dropout_p: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    assert dropout_p == 0
    if bias is not None:
        assert bias.dtype == query.dtype
        assert bias.shape == (*query.shape[:-1], key.shape[-2])
        assert bias.stride(-1) == 1
        assert all(step % 16 == 0 for step in bias.stride()[:-1])
    rows = -(-query.shape[2] // 32) * 32 if learns else 0
    numbers = torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)
    out = plain(query, key, value, bias, causal, scale)
    return in_layout_of_gpus(out), query.new_zeros(*query.shape[:2], rows, dtype=torch.float32), *numbers


def efficient_backward(grad: Tensor, *arguments: Any, scale: float | None = None) -> tuple[Any, ...]:
    query, key, value, bias, _out, statistics, _seed, _offset, _dropout, wanted, *causal = arguments
    assert statistics.shape[2] >= query.shape[2]
    found = gradients(grad, [query, key, value, bias], bool(causal and causal[0]), scale)
    return tuple(each if want else None for each, want in zip(found, wanted, strict=True))


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    assert dropout_p == 0
    assert not return_debug_mask
    assert query.shape[-1] % 8 == 0
    statistics = query.new_zeros(query.shape[:3], dtype=torch.float32)
    random = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    out = in_layout_of_gpus(plain(query, key, value, None, causal, scale))
    return out, statistics, None, None, query.shape[2], key.shape[2], *random, query.new_empty(0)


def flash_backward(grad: Tensor, *arguments: Any, scale: float | None = None) -> tuple[Any, ...]:
    query, key, value, _out, _statistics, _q, _k, rows, columns, _dropout, causal, _seed, _offset = arguments
    assert (rows, columns) == (query.shape[2], key.shape[2])
    return tuple(gradients(grad, [query, key, value, None], causal, scale)[:3])


KINDS = ("rnn_relu", "rnn_tanh", "lstm", "gru")


def recurrent(
    data: Tensor, weights: list[Tensor], each: int, hx: Tensor, cx: Tensor | None, mode: int, *rest: Any
) -> tuple[Tensor, ...]:
    """Run a layer by PyTorch's own composition."""
    layers, batch_first, dropout, train, bidirectional, batch_sizes = rest
    options = each >= 4, layers, dropout, train, bidirectional
    hidden: Any = hx if cx is None else [hx, cx]
    op = getattr(aten, KINDS[mode])
    if batch_sizes:
        return op.data(data, torch.tensor(batch_sizes), hidden, weights, *options)
    return op.input(data, hidden, weights, *options, batch_first)


def cudnn(
    data: Tensor, weights: list[Tensor], each: int, buffer: None, hx: Tensor, cx: Tensor | None, mode: int, *rest: Any
) -> tuple[Tensor, ...]:
    size, projected, *rest, state = rest
    assert buffer is None
    assert weights[1].shape[1] == (projected or size)
    assert (state is not None) == bool(rest[2] and rest[3])
    output, last, *cell = recurrent(data, weights, each, hx, cx, mode, *rest)
    kept = data.new_empty(7, dtype=torch.uint8) if rest[3] else data.new_empty(0, dtype=torch.uint8)
    return output, last, cell[0] if cell else data.new_empty(0), kept, data.new_empty(3)


def cudnn_backward(
    data: Tensor, weights: list[Tensor], each: int, buffer: Tensor, hx: Tensor, cx: Tensor | None, *arguments: Any
) -> tuple[Any, ...]:
    _output, *grads, mode, _size, _projected = arguments[:7]
    *rest, _state, kept, _wanted = arguments[7:]
    assert (buffer.numel(), kept.numel()) == (3, 7)
    with torch.inference_mode(False), torch.enable_grad():
        own = [None if x is None else x.clone().requires_grad_() for x in (data, hx, cx, *weights)]
        data, hx, cx, *weights = own
        results = recurrent(data, weights, each, hx, cx, mode, *rest)
        pairs = [(x, grad.clone()) for x, grad in zip(results, grads, strict=False) if grad is not None]
        inputs = [x for x in own if x is not None]
        found = iter(torch.autograd.grad([x for x, _ in pairs], inputs, [grad for _, grad in pairs]))
    of_data, of_hx, of_cx = (None if x is None else next(found) for x in own[:3])
    return of_data, of_hx, of_cx, list(found)


class StandInTape:
    """What a CUDA graph is: records ops and the memory that they use without doing them, and does them at a replay."""

    def __init__(self) -> None:
        self.ops: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def record(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        drawn = torch.get_rng_state()
        noting = _Noting()
        try:
            with noting:
                return run()
        finally:
            self.ops = noting.ops
            for *_, made in self.ops:
                for tensor in made:
                    bytes_of(tensor).fill_(0x7F)
            for tensor, before in noting.before.values():  # nothing was done
                bytes_of(tensor).copy_(before)
            torch.set_rng_state(drawn)

    def replay(self) -> None:
        for op, args, kwargs, made in self.ops:
            results = op(*args, **kwargs)
            for tensor, result in zip(made, _new(op, results), strict=True):
                bytes_of(tensor).copy_(bytes_of(result))


class _Noting(TorchDispatchMode):
    """Notes ops, what they make, and what was in the memory that they are given from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Memory is what is recorded, whatever the tensors over it are set to later.
        args, kwargs = tree_map_only(Tensor, aten.alias, (args, kwargs or {}))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                place = tensor.untyped_storage()._cdata
                if place not in self.before and place not in self.made:
                    self.before[place] = tensor, bytes_of(tensor).clone()
        results = op(*args, **kwargs)
        made = _new(op, results)
        self.made.update(tensor.untyped_storage()._cdata for tensor in made)
        self.ops.append((op, args, kwargs, made))
        return results


def _new(op: Any, results: Any) -> list[Tensor]:
    """Return the results of an op that are in memory of their own."""
    returns = op._schema.returns
    pairs = zip(results if len(returns) > 1 else (results,), returns, strict=False)
    return [x for each, value in pairs if value.alias_info is None for x in tree_leaves(each) if isinstance(x, Tensor)]


if __name__ == "__main__":
    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_sdp_choice", choice, "CPU", allow_override=True)
    for name, kernel in {
        "_scaled_dot_product_efficient_attention": efficient,
        "_scaled_dot_product_efficient_attention_backward": efficient_backward,
        "_scaled_dot_product_flash_attention": flash,
        "_scaled_dot_product_flash_attention_backward": flash_backward,
        "_cudnn_rnn": cudnn,
        "_cudnn_rnn_backward": cudnn_backward,
        "_cudnn_init_dropout_state": lambda dropout, train, seed, **_: torch.zeros(9, dtype=torch.uint8),
    }.items():
        library.impl(name, kernel, "CPU")
    worker.Greeting = lambda **what: Greeting(**what | {"device": "cuda:0"})  # type: ignore[assignment, misc]
    graphs.tapes_of = lambda device: StandInTape
    StandInTape().record(lambda: [torch.ones(1)])  # what that imports cannot be read by a worker
    worker.main()
