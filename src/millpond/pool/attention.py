"""Attention by the fused kernel that PyTorch would choose on the worker's device; it has no way to choose for a pool.

A worker's CPU chooses as this process's does. A GPU's choice depends on what it is, so its worker is asked, once for
each kind of operands. What `torch.nn.attention.sdpa_kernel` allows counts as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from millpond.pool.tensors import DEVICE, device_of, is_on_gpu

Tensor = torch.Tensor
aten = torch.ops.aten

FLASH, EFFICIENT, CUDNN = 1, 2, 3
"""What `_fused_sdp_choice` says (`SDPBackend`); anything else: no fused kernel."""
MASK_ALIGNMENT = 16
"""Elements that the rows of a mask must begin at multiples of, for the efficient kernel."""
HEAD_ALIGNMENT = 8
"""Numbers of a head that the flash kernel takes together."""
MAX_CHOICES = 4096

_cpu_choice = aten._fused_sdp_choice.default._op_dk
_choices: dict[Any, int] = {}
"""What workers with a GPU have said, by device and kind of operands."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` of tensors of the pool."""
    call = (query, key, value, attn_mask, dropout_p, is_causal)
    options = {"scale": scale, "enable_gqa": enable_gqa}
    if query.numel() and key.numel():
        if not is_on_gpu(query):
            fused = _cpu_choice(torch._C.DispatchKey.CPU, *call, **options) == FLASH
            if fused and (attn_mask is None or not attn_mask.requires_grad):
                flash = aten._scaled_dot_product_flash_attention_for_cpu
                bias = _bias(attn_mask, query)
                return flash(query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale)[0]  # type: ignore[no-any-return]
        elif (kernel := _allowed(_choice(call, enable_gqa), attn_mask)) is not None:
            return kernel(*call, scale)
    return aten._scaled_dot_product_attention_math(*call, **options)[0]  # type: ignore[no-any-return]


def _choice(call: tuple[Any, ...], enable_gqa: bool) -> int:
    """Return what the worker's GPU would choose, of all kernels."""
    *tensors, dropout_p, is_causal = call
    kinds = [None if t is None else (t.dtype, tuple(map(int, t.shape)), tuple(map(int, t.stride()))) for t in tensors]
    index = device_of(call[0]).index
    kind = (index, *kinds, dropout_p > 0, is_causal, enable_gqa)
    choice = _choices.get(kind)
    if choice is None:
        with torch.no_grad(), _disable_current_modes():  # tracing shows tensors that no worker has
            alike = [
                None if kind is None else torch.empty_strided(*kind[1:], dtype=kind[0], device=f"{DEVICE}:{index}")
                for kind in kinds
            ]
            choice = int(aten._fused_sdp_choice(*alike, dropout_p, is_causal, enable_gqa=enable_gqa))
        if len(_choices) >= MAX_CHOICES:
            _choices.clear()
        _choices[kind] = choice
    return choice


def _allowed(choice: int, mask: Tensor | None) -> Callable[..., Tensor] | None:
    """Return the kernel that comes nearest to a choice among those that the program allows; None: no fused one.

    Raises:
        RuntimeError: the program allows none that would do.
    """
    if choice in (FLASH, CUDNN) and mask is None and torch._C._get_flash_sdp_enabled():
        return _flash
    if choice in (FLASH, EFFICIENT, CUDNN) and torch._C._get_mem_efficient_sdp_enabled():
        return _efficient
    if not torch._C._get_math_sdp_enabled():
        raise RuntimeError("No available kernel. Aborting execution.")
    return None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, _: None, dropout_p: float, is_causal: bool, scale: float | None
) -> Tensor:
    size = query.shape[-1]
    scale = 1 / math.sqrt(size) if scale is None else scale
    if more := -size % HEAD_ALIGNMENT:
        query, key, value = (F.pad(x, (0, more)) for x in (query, key, value))
    out: Tensor = aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, return_debug_mask=False, scale=scale
    )[0]
    return out[..., :size] if more else out


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    bias = _bias(mask, query)
    if bias is not None:
        if bias.stride(-1) != 1 or any(step % MASK_ALIGNMENT for step in bias.stride()[:-1]):
            size = bias.shape[-1]
            bias = F.pad(bias, (0, MASK_ALIGNMENT - size % MASK_ALIGNMENT))[..., :size]
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
        query, key, value, bias, learns, dropout_p, is_causal, scale=scale
    )[0]


def _bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return a mask as what is added to the scores."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
