"""A worker whose CPU says that it is a GPU, and has kernels that PyTorch has on GPUs only.

They compute by PyTorch's plain attention, and look as those of a GPU do: what they return, in which memory layout, and
what they ask of their operands. Which one it would choose goes by the dtype: bfloat16 (unmasked) the flash kernel,
float32 the efficient one, float64 none. Started as a worker is: `python stand_in_gpu.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from millpond.pool import worker

NAME = "Stand-in GPU"
Tensor = torch.Tensor
aten = torch.ops.aten


def choice(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *_: Any, **_options: Any) -> int:
    if query.dtype is torch.bfloat16 and mask is None:
        return 1
    return 0 if query.dtype is torch.float64 else 2


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


if __name__ == "__main__":
    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_sdp_choice", choice, "CPU", allow_override=True)
    for name, kernel in {
        "_scaled_dot_product_efficient_attention": efficient,
        "_scaled_dot_product_efficient_attention_backward": efficient_backward,
        "_scaled_dot_product_flash_attention": flash,
        "_scaled_dot_product_flash_attention_backward": flash_backward,
    }.items():
        library.impl(name, kernel, "CPU")
    worker.main()
