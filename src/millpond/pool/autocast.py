"""`torch.autocast` on the pool device, by the rules that PyTorch has for CUDA, and under that name as well.

PyTorch keeps the state of an out-of-tree device's autocast, but none of the rules: which ops run in the lower
precision, which in float32, which in the widest of their operands. The lists are those of ATen/autocast_mode.h.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from millpond.pool.tensors import DEVICE, device_of

Tensor = torch.Tensor

LOWER = """_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input conv_transpose3d.input
convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul
linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
scaled_dot_product_attention"""
"""Run in the lower precision."""
FLOAT32 = """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim nuclear_norm
nuclear_norm.dim cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss
kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp
upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d
_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d
upsample_bicubic2d _upsample_bicubic2d_aa"""
"""Run in float32."""
FLOAT32_RESULT = """prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
linalg_matrix_norm.str_ord sum sum.dim_IntList"""
"""Give float32 unless the program asks for something else."""
WIDEST = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add"
"""Run in the widest of their operands' dtypes."""

_EXCLUDED = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]
_exclude = torch._C._ExcludeDispatchKeyGuard
_all = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
_casts: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
"""Parameters in the lower precision, each cast once while autocast lasts."""


def install(library: torch.library.Library) -> None:
    """Give the pool device the rules, and let `cuda` mean it in autocast's functions."""
    _all.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # type: ignore[no-untyped-call]
    for names, rule in ((LOWER, _lower), (FLOAT32, _float32), (FLOAT32_RESULT, _float32_result), (WIDEST, _widest)):
        for name in names.split():
            library.impl(name, rule(_overload(name)), "AutocastPrivateUse1")  # type: ignore[no-untyped-call]
    for name in ("norm.Scalar", "norm.ScalarOpt_dim"):
        library.impl(name, _float32_norm(_overload(name)), "AutocastPrivateUse1")  # type: ignore[no-untyped-call]
    library.impl("binary_cross_entropy", _unsafe, "AutocastPrivateUse1")  # type: ignore[no-untyped-call]

    torch.clear_autocast_cache = _clearing(torch.clear_autocast_cache)
    for name in ("is_autocast_enabled", "set_autocast_enabled", "get_autocast_dtype", "set_autocast_dtype"):
        setattr(torch, name, _of_pool(getattr(torch, name)))
    torch.get_autocast_gpu_dtype = functools.partial(torch.get_autocast_dtype, DEVICE)
    torch.set_autocast_gpu_dtype = functools.partial(torch.set_autocast_dtype, DEVICE)
    torch.autocast.__init__ = _of_pool_method(torch.autocast.__init__)  # type: ignore[method-assign]


def _overload(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, base), overload or "default")


def _lower(op: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _exclude(_EXCLUDED):
            args, kwargs = _cast_all(args, kwargs, torch.get_autocast_dtype(DEVICE))
            return op(*args, **kwargs)

    return run


def _float32(op: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _exclude(_EXCLUDED):
            args, kwargs = _cast_all(args, kwargs, torch.float32)
            return op(*args, **kwargs)

    return run


def _float32_result(op: Any) -> Callable[..., Any]:
    place = next((p for p, a in enumerate(op._schema.arguments) if a.name == "dtype" and not a.kwarg_only), None)

    def run(*args: Any, **kwargs: Any) -> Any:
        with _exclude(_EXCLUDED):
            given = args[place] if place is not None and place < len(args) else kwargs.get("dtype")
            if given is None and _is_eligible(args[0]):
                if place is not None and place < len(args):
                    args = (*args[:place], torch.float32, *args[place + 1 :])
                else:
                    kwargs["dtype"] = torch.float32
            return op(*args, **kwargs)

    return run


def _float32_norm(op: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _exclude(_EXCLUDED):
            args = (args[0].float() if _is_eligible(args[0]) else args[0], *args[1:])
            return op(*args, **kwargs)

    return run


def _widest(op: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _exclude(_EXCLUDED):
            dtypes = {tensor.dtype for tensor in _tensors((*args, *kwargs.values())) if _is_eligible(tensor)}
            widest = torch.float32 if torch.float32 in dtypes else torch.get_autocast_dtype(DEVICE)
            args, kwargs = _cast_all(args, kwargs, widest)
            return op(*args, **kwargs)

    return run


def _unsafe(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast.\nMany models use a "
        "sigmoid layer right before the binary cross entropy layer.\nIn this case, combine the two layers using "
        "torch.nn.functional.binary_cross_entropy_with_logits\nor torch.nn.BCEWithLogitsLoss. "
        "binary_cross_entropy_with_logits and BCEWithLogits are\nsafe to autocast."
    )


def _cast_all(
    args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(_cast(value, dtype) for value in args), {name: _cast(value, dtype) for name, value in kwargs.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        if value.dtype is dtype or not _is_eligible(value):
            return value
        if value.is_leaf and value.requires_grad and value.dtype is torch.float32 and torch.is_autocast_cache_enabled():
            known = _casts.get(id(value))
            if known is not None and known[0]() is value and known[1].dtype is dtype:
                return known[1]
            cast = value.to(dtype)
            _casts[id(value)] = weakref.ref(value), cast
            return cast
        return value.to(dtype)
    if isinstance(value, (list, tuple)):
        return [_cast(element, dtype) for element in value]
    return value


def _is_eligible(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dtype is not torch.float64
        and device_of(value).type == DEVICE
    )


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(tuple(value))


def _clearing(function: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(function)
    def clear() -> None:
        _casts.clear()
        function()

    return clear


def _of_pool(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of autocast's state that takes `cuda`, and no device at all, for the pool."""

    @functools.wraps(function)
    def call(device_type: Any = DEVICE, *args: Any) -> Any:
        if isinstance(device_type, (bool, torch.dtype)):  # the older form, without a device
            return function(DEVICE, device_type)
        return function(DEVICE if device_type == "cuda" else device_type, *args)

    return call


def _of_pool_method(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def call(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        function(self, DEVICE if device_type == "cuda" else device_type, *args, **kwargs)

    return call
