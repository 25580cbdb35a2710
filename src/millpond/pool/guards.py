"""What some of PyTorch's kernels take on trust from a program, and a worker must not take from a client.

Each check here stands for a read or a write beyond a tensor, found by tests/attacks/fuzz_pool_wire.py; all other ops
check their arguments themselves. A failed check raises `ValueError`, as an op does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensors = Sequence[torch.Tensor]


def of(name: str) -> Callable[..., None] | None:
    """Return what checks the arguments of an op, such as `aten::_fused_sgd_`; None for nearly all."""
    return _GUARDS.get(name.removeprefix("aten::").partition(".")[0])


def _padding(dims: int) -> Callable[..., None]:
    def check(gradient: torch.Tensor, x: torch.Tensor, padding: Sequence[int], **_out: Any) -> None:
        _require(len(padding) == 2 * dims and x.dim() > dims, "two paddings for each padded dimension")

    return check


def _fractional_pool(dims: int) -> Callable[..., None]:
    def check(
        gradient: torch.Tensor,
        x: torch.Tensor,
        kernel_size: Sequence[int],
        output_size: Sequence[int],
        indices: torch.Tensor,
        **_out: Any,
    ) -> None:
        sized = len(kernel_size) == len(output_size) == dims and x.dim() > dims
        _require(sized, "a kernel and an output size for each pooled dimension")
        _require(gradient.shape == indices.shape, "an index for each gradient")

    return check


def _fourier(x: torch.Tensor, dim: Sequence[int], normalization: int, *_rest: Any, **_out: Any) -> None:
    _require(len(set(dim)) == len(dim) and all(0 <= d < x.dim() for d in dim), "distinct dimensions of its operand")
    _require(0 <= normalization <= 2, "a known normalization")


def _same_shapes(gradient: torch.Tensor, result: torch.Tensor, *_: Any, **_out: Any) -> None:
    _require(gradient.shape == result.shape, "a gradient for each number of the result")


def _known_statistics(x: torch.Tensor, weight: Any, bias: Any, mean: Any, variance: Any, *_: Any, **_out: Any) -> None:
    _require(mean is not None and variance is not None, "a mean and a variance to normalize by")
    _by_channel(x, weight, bias, mean, variance)


def _batch_norm(x: torch.Tensor, weight: Any, bias: Any, *rest: Any, **_out: Any) -> None:
    mean, variance, training = (*rest[:2], rest[2]) if not isinstance(rest[0], bool) else (None, None, rest[0])
    _require(bool(training) or (mean is not None and variance is not None), "a mean and a variance to normalize by")
    _by_channel(x, weight, bias, mean, variance)


def _batch_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: Any, mean: Any, variance: Any, *rest: Any, **_out: Any
) -> None:
    saved_mean, saved_deviation, training = rest[:3]
    _require(gradient.shape == x.shape and x.numel() > 0, "a gradient for each number of the result")
    used = (saved_mean, saved_deviation) if training else (mean, variance)
    _require(all(statistic is not None for statistic in used), "the mean and variance that it was normalized by")
    _by_channel(x, weight, mean, variance, *used)


def _by_channel(x: torch.Tensor, *vectors: torch.Tensor | None) -> None:
    _require(x.dim() >= 2 and x.size(1) > 0, "a batch of channels")
    fit = all(vector is None or tuple(vector.shape) == (x.size(1),) for vector in vectors)
    _require(fit, "one number for each channel")


def _range(start: Any, end: Any, step: Any = 1, *, out: Any = None, dtype: Any = None, **_options: Any) -> None:
    kind = dtype if out is None else out.dtype
    whole = kind is not None and not kind.is_floating_point and not kind.is_complex
    _require(step != 0 and (not whole or abs(step) >= 1), "a step other than 0")


def _adam(
    parameters: Tensors, gradients: Tensors, averages: Tensors, squares: Tensors, maxima: Tensors, steps: Tensors,
    *, amsgrad: bool = False, **_numbers: Any,
) -> None:  # fmt: skip
    _same_sizes(parameters, gradients, averages, squares, *([maxima] if amsgrad else []))
    _one_number_each(parameters, steps)


def _sgd(parameters: Tensors, gradients: Tensors, momenta: Tensors, *, momentum: float = 0.0, **_numbers: Any) -> None:
    _same_sizes(parameters, gradients, *([momenta] if momentum else []))


def _adagrad(parameters: Tensors, gradients: Tensors, sums: Tensors, steps: Tensors, *_: Any, **_numbers: Any) -> None:
    _same_sizes(parameters, gradients, sums)
    _one_number_each(parameters, steps)


def _same_sizes(parameters: Tensors, *others: Tensors) -> None:
    """Require lists of tensors that the kernel can walk through together, by their addresses alone."""
    for tensors in (parameters, *others):
        _require(len(tensors) == len(parameters), "lists of the same length")
        for tensor, parameter in zip(tensors, parameters, strict=True):
            reach = (int(tensor.storage_offset()) + parameter.numel()) * tensor.itemsize
            fits = tensor.shape == parameter.shape and reach <= tensor.untyped_storage().nbytes()
            _require(fits, "tensors of the same shapes")


def _one_number_each(parameters: Tensors, steps: Tensors) -> None:
    counted = len(steps) == len(parameters) and all(step.numel() == 1 for step in steps)
    _require(counted, "one step number for each parameter")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"it needs {what}")


_GUARDS: dict[str, Callable[..., None]] = {
    **{f"reflection_pad{dims}d_backward": _padding(dims) for dims in (1, 2, 3)},
    **{f"replication_pad{dims}d_backward": _padding(dims) for dims in (1, 2, 3)},
    **{f"fractional_max_pool{dims}d_backward": _fractional_pool(dims) for dims in (2, 3)},
    **dict.fromkeys(("_fft_r2c", "_fft_c2c", "_fft_c2r"), _fourier),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data"), _same_shapes),
    **dict.fromkeys(("_batch_norm_no_update", "_native_batch_norm_legit_no_training"), _known_statistics),
    **dict.fromkeys(("_batch_norm_with_update", "_batch_norm_with_update_functional"), _known_statistics),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit"), _batch_norm),
    "_native_batch_norm_legit_functional": _batch_norm,
    **dict.fromkeys(("native_batch_norm_backward", "batch_norm_backward"), _batch_norm_backward),
    "range": _range,
    **dict.fromkeys(("_fused_adam_", "_fused_adamw_"), _adam),
    "_fused_sgd_": _sgd,
    "_fused_adagrad_": _adagrad,
}
