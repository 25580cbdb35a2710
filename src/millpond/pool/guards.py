"""What some of PyTorch's kernels take on trust from a program, and a worker must not take from a client.

Each check here stands for a read or a write beyond a tensor, a division that ends the process, or a loop without end,
found by tests/attacks/fuzz_pool_wire.py; all other ops check their arguments themselves. A failed check raises
`RuntimeError`, as an op does. Indices are looked at on a CPU only: on a GPU that would wait for all that came before,
and what a kernel there reaches is the lease's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from millpond.pool.codec import MAX_ELEMENTS

Tensors = Sequence[torch.Tensor]
MAX_DEGREE = 1 << 16
"""Rounds that a kernel may take for one number: the degree of a polynomial, or a shift to where a series begins."""
LAST = 2**63 - 1


def of(name: str) -> Callable[..., None] | None:
    """Return what checks the arguments of an op, such as `aten::_fused_sgd_`; None for nearly all."""
    name = name.removeprefix("aten::")
    return _GUARDS.get(name) or _GUARDS.get(name.partition(".")[0])


def _padding(dims: int) -> Callable[..., None]:
    def check(gradient: torch.Tensor, x: torch.Tensor, padding: Sequence[int], **_out: Any) -> None:
        _require(len(padding) == 2 * dims and x.dim() > dims, "two paddings for each padded dimension")
        added = [padding[2 * place] + padding[2 * place + 1] for place in reversed(range(dims))]
        padded = [size + more for size, more in zip(x.shape[-dims:], added, strict=True)]
        _require(x.dim() <= dims + 2 and gradient.shape == (*x.shape[:-dims], *padded), "a gradient for each number")

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
        _require(gradient.shape == indices.shape and _is_dense(indices), "an index for each gradient")
        _within(indices, math.prod(x.shape[-dims:]))

    return check


def _convolution(*arguments: Any, **_out: Any) -> None:
    """Require strides, paddings and dilations that stay what they are in 32 bits."""
    numbers = [number for argument in arguments if isinstance(argument, (list, tuple)) for number in argument]
    _require(all(abs(number) < 2**31 for number in numbers), "strides, paddings and dilations below 2**31")


def _apart(*operands: Any, **options: Any) -> None:
    """Require results whose memory is no operand's, and no other result's."""
    tensors = [value for value in (*operands, *options.values()) if isinstance(value, torch.Tensor) and value.numel()]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    _require(len(storages) == len(tensors), "results in memory of their own")


def _unfolded(gradient: torch.Tensor, sizes: Sequence[int], dim: int, size: int, step: int, **_out: Any) -> None:
    rank = max(1, len(sizes))  # a scalar has one window
    _require(-rank <= dim < rank and step > 0, "a dimension that the input has, and a step")
    windows = [*sizes, size]
    if sizes:
        _require(0 <= size <= sizes[dim], "windows within the dimension")
        windows[dim % rank] = (sizes[dim] - size) // step + 1
    _require(list(gradient.shape) == windows, "a gradient for each number of each window")


def _observed(x: torch.Tensor, *rest: Any, **_out: Any) -> None:
    axis, by_channel = (*rest[9:11], False)[:2]
    _require(not by_channel or 0 <= axis < x.dim(), "an axis that its operand has")


def _pads(dims: int) -> Callable[..., None]:
    def check(x: torch.Tensor, padding: Sequence[int], **_out: Any) -> None:
        fit = len(padding) == 2 * dims < 2 * x.dim() and all(abs(pad) < 2**31 for pad in padding)
        _require(fit, "two paddings for each padded dimension")

    return check


def _grid(gradient: torch.Tensor, x: torch.Tensor, grid: torch.Tensor, *_: Any, **_out: Any) -> None:
    _require(x.dim() == grid.dim() in (4, 5), "images and grids of as many dimensions")
    shape = (x.size(0), x.size(1), *grid.shape[1:-1])
    _require(gradient.shape == shape and grid.size(-1) == x.dim() - 2, "a gradient for each number of the result")


def _margins(place: int) -> Callable[..., None]:
    def check(gradient: torch.Tensor, x: torch.Tensor, _target: Any, *rest: Any, **_out: Any) -> None:
        reduced = rest[place] != 0 if len(rest) > place else True
        rows = x.size(0) if x.dim() == 2 else 1
        _require(x.dim() <= 2 and gradient.numel() == (1 if reduced else rows), "a gradient for each number")

    return check


def _layer_norm(
    gradient: torch.Tensor, x: torch.Tensor, sizes: Sequence[int], mean: torch.Tensor, deviation: torch.Tensor,
    weight: Any, bias: Any, *_: Any, **_out: Any,
) -> None:  # fmt: skip
    kept = x.dim() - len(sizes)
    _require(0 <= kept < x.dim() and tuple(x.shape[kept:]) == tuple(sizes), "the sizes that it was normalized over")
    rows = math.prod(x.shape[:kept])
    fit = gradient.shape == x.shape and mean.numel() == deviation.numel() == rows
    _require(fit and all(v is None or tuple(v.shape) == tuple(sizes) for v in (weight, bias)), "statistics of each row")


def _pivots(factors: torch.Tensor, pivots: torch.Tensor, *_: Any, **_out: Any) -> None:
    fit = factors.dim() >= 2 and pivots.shape == (*factors.shape[:-2], min(factors.shape[-2:]))
    _require(fit, "a pivot for each column")
    if pivots.device.type == "cpu":
        _within(pivots.abs(), factors.size(-2) + 1, least=1)


def _pivots_of_blocks(factors: torch.Tensor, pivots: torch.Tensor, *_: Any, **_out: Any) -> None:
    """Require pivots as LAPACK's ?sytrf makes them: a block of two has the same negative number twice."""
    _pivots(factors, pivots)
    if pivots.device.type == "cpu":
        for row in pivots.reshape(-1, pivots.size(-1)).tolist() if pivots.numel() else ():
            place = 0
            while place < len(row):
                block = 1 if row[place] > 0 else 2
                _require(len(set(row[place : place + 2])) == 1 < len(row) - place or block == 1, "pivots in pairs")
                place += block


def _consecutive_pool(gradient: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, **_out: Any) -> None:
    _pooled(3, True)(gradient, x, indices)
    _require(indices.is_contiguous(), "contiguous indices")


def _pooled(dims: int, by_indices: bool, least: int = 1) -> Callable[..., None]:
    def check(gradient: torch.Tensor, x: torch.Tensor, *rest: Any, **_out: Any) -> None:
        alike = gradient.dim() == x.dim() in (dims + 1, dims + 2) and gradient.shape[:-dims] == x.shape[:-dims]
        alike = alike and min(gradient.shape[-dims:]) >= least and min(x.shape[-dims:]) > 0
        alike = alike and gradient.dtype == x.dtype
        _require(alike, "a gradient for each number of the result")
        if by_indices:
            alike = rest[-1].shape == gradient.shape and _is_dense(rest[-1])
            _require(alike, "an index for each gradient")
            _within(rest[-1], math.prod(x.shape[-dims:]))

    return check


def _classes(gradient: torch.Tensor, x: torch.Tensor, target: torch.Tensor, *rest: Any, **_out: Any) -> None:
    _require(
        x.dim() > 1 or (x.dim() == 1 and target.numel() == 1), "a number for each class, and a class for each text"
    )
    if target.device.type == "cpu":
        _within(target[target != rest[2]], x.size(0) if x.dim() == 1 else x.size(1))


def _ctc(
    x: torch.Tensor, targets: torch.Tensor, lengths: Any, target_lengths: Any, blank: int = 0, *_: Any, **_out: Any
) -> None:
    _alignment(x, targets, lengths, target_lengths, blank)


def _ctc_backward(
    gradient: torch.Tensor, x: torch.Tensor, targets: torch.Tensor, lengths: Any, target_lengths: Any,
    loss: torch.Tensor, log_alpha: torch.Tensor, blank: int, *_: Any, **_out: Any,
) -> None:  # fmt: skip
    longest = _alignment(x, targets, lengths, target_lengths, blank)
    shape = (x.size(1), x.size(0), 2 * longest + 1)
    fit = log_alpha.dim() == 3 and log_alpha.shape[:2] == shape[:2] and log_alpha.size(2) >= shape[2]
    _require(fit and gradient.shape == loss.shape == x.shape[1:2], "what the forward op made of the same operands")


def _alignment(x: torch.Tensor, targets: torch.Tensor, lengths: Any, target_lengths: Any, blank: int) -> int:
    """Require targets that the kernel finds within its operands; return the longest."""
    inputs, outputs = (torch.as_tensor(each, dtype=torch.int64).cpu() for each in (lengths, target_lengths))
    _require(x.dim() == 3 and inputs.shape == outputs.shape == x.shape[1:2], "a batch of sequences with their lengths")
    _require(0 <= blank < x.size(2), "a blank that is one of the classes")
    _within(inputs, x.size(0) + 1)
    _within(outputs, targets.size(-1) + 1 if targets.dim() else 1)
    if targets.dim() == 2 and targets.size(0) == len(outputs):
        used = targets[torch.arange(targets.size(1), device=targets.device) < outputs.to(targets.device)[:, None]]
    else:
        _require(targets.dim() == 1 and int(outputs.sum()) == targets.numel(), "as many targets as their lengths say")
        used = targets
    _within(used, x.size(2))
    return int(outputs.max()) if len(outputs) else 0


def _embedding_backward(
    _gradient: Any, indices: torch.Tensor, rows: int, _padding: int, by_frequency: bool, **_out: Any
) -> None:
    if by_frequency:
        _within(indices, rows)


def _bags(
    _weight: Any, indices: torch.Tensor, offsets: torch.Tensor, _by_frequency: bool = False, mode: int = 0,
    _sparse: bool = False, per_sample: Any = None, *_: Any, **_out: Any,
) -> None:  # fmt: skip
    _require(indices.dim() == offsets.dim() == 1 and 0 <= mode <= 2, "a list of indices, of offsets, and a known mode")
    _require(per_sample is None or per_sample.shape == indices.shape, "a weight for each index")
    _side_by_side(indices, offsets)
    _require(len(offsets) > 0 or len(indices) == 0, "a bag for the indices")
    _ascending(offsets, len(indices))


def _side_by_side(*indices: torch.Tensor) -> None:
    """Require indices that a kernel can walk through by their address, as it does."""
    _require(all(index.is_contiguous() for index in indices), "indices that are not a view")


def _bags_backward(
    gradient: torch.Tensor, indices: torch.Tensor, bag: torch.Tensor, sizes: torch.Tensor, largest: torch.Tensor,
    rows: int, _by_frequency: bool, mode: int, per_sample: Any, *_: Any, **_out: Any,
) -> None:  # fmt: skip
    bagged = indices.dim() == 1 and bag.shape == indices.shape and gradient.dim() == 2 and 0 <= mode <= 2
    _require(bagged and sizes.shape == gradient.shape[:1], "a bag for each index, and a gradient for each bag")
    _require(per_sample is None or per_sample.shape == indices.shape, "a weight for each index")
    _side_by_side(indices, bag, sizes, largest)
    _within(bag, gradient.size(0))
    _within(indices, rows)
    if mode == 2:
        _require(largest.shape == gradient.shape, "an index for each gradient")
        _within(largest, rows, least=-1)


def _bags_backward_by_offsets(
    gradient: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, bag: torch.Tensor, sizes: torch.Tensor,
    largest: torch.Tensor, rows: int, by_frequency: bool, mode: int, _sparse: bool, per_sample: Any, *_: Any,
) -> None:  # fmt: skip
    _bags_backward(
        gradient, indices, _bag_of(indices, offsets, bag), sizes, largest, rows, by_frequency, mode, per_sample
    )


def _bag_of(indices: torch.Tensor, offsets: torch.Tensor, bag: torch.Tensor) -> torch.Tensor:
    """Return the bag of each index; where none are given, the op makes them of the offsets."""
    if bag.numel() or not indices.numel():
        return bag
    _require(indices.dim() == offsets.dim() == 1 and len(offsets) > 0, "offsets of bags")
    _ascending(offsets, len(indices))
    if offsets.device.type != "cpu":
        return torch.zeros_like(indices)
    return torch.searchsorted(offsets, torch.arange(len(indices), dtype=offsets.dtype), right=True) - 1


def _bag_weights_backward(
    gradient: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, bag: torch.Tensor,
    *_: Any, **_out: Any,
) -> None:  # fmt: skip
    bag = _bag_of(indices, offsets, bag)
    _require(indices.dim() == 1 and bag.shape == indices.shape, "a bag for each index")
    _require(gradient.dim() == weight.dim() == 2 and gradient.size(1) == weight.size(1), "gradients as wide as rows")
    _side_by_side(indices, bag)
    _within(bag, gradient.size(0))
    _within(indices, weight.size(0))


def _segments(data: torch.Tensor, _how: Any, **options: Any) -> None:
    _partition(data, options.get("lengths"), options.get("offsets"), options.get("axis", 0))


def _segments_backward(
    gradient: torch.Tensor, result: torch.Tensor, data: torch.Tensor, _how: Any, *, lengths: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None, axis: int = 0, **_out: Any,
) -> None:  # fmt: skip
    _partition(data, lengths, offsets, axis)
    given = lengths if lengths is not None else offsets
    count = 0 if given is None else given.size(axis) - (lengths is None)
    shape = (*data.shape[:axis], count, *data.shape[axis + 1 :])
    _require(gradient.shape == result.shape == shape, "a gradient for each segment")


def _partition(data: torch.Tensor, lengths: torch.Tensor | None, offsets: torch.Tensor | None, axis: int) -> None:
    """Require lengths or offsets that divide `axis` of the data into segments."""
    given = lengths if lengths is not None else offsets
    fit = given is not None and 0 <= axis < data.dim() and given.shape[:-1] == data.shape[:axis] and given.dim() > 0
    _require(fit, "lengths or offsets along an axis of its operand")
    whole = data.size(axis)
    if lengths is not None:
        _within(lengths, whole + 1)
        _within(lengths.sum(-1), whole + 1)
    elif offsets is not None:
        _require(offsets.size(-1) > 0, "an offset to begin with")
        _ascending(offsets, whole)


def _distances_backward(
    gradient: torch.Tensor, x: torch.Tensor, y: torch.Tensor, _norm: float, distances: torch.Tensor, **_out: Any
) -> None:
    _require(x.dim() >= 2 and y.dim() >= 2 and x.size(-1) == y.size(-1), "points of as many dimensions")
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])  # type: ignore[no-untyped-call]
    shape = (*batch, x.size(-2), y.size(-2))
    _require(gradient.shape == distances.shape == shape, "a gradient and a distance for each pair")
    _packed(gradient, distances, dtype=x.dtype)


def _pair_distances_backward(
    gradient: torch.Tensor, x: torch.Tensor, _norm: float, distances: torch.Tensor, **_out: Any
) -> None:
    _require(x.dim() == 2 and len(x) > 0, "a list of points")
    pairs = (x.size(0) * (x.size(0) - 1) // 2,)
    _require(gradient.shape == distances.shape == pairs, "a gradient and a distance for each pair")
    _packed(gradient, distances, dtype=x.dtype)


def _packed(*tensors: torch.Tensor, dtype: torch.dtype) -> None:
    _require(all(t.is_contiguous() and t.dtype == dtype for t in tensors), "contiguous operands of one dtype")


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **_options: Any) -> None:
    fit = query.dim() == key.dim() == value.dim() == 4 and key.shape == value.shape and query.size(0) == key.size(0)
    _require(fit and query.size(3) == key.size(3), "queries, keys and values of one batch and width")
    _require(min(*query.shape, *key.shape) > 0 and query.size(1) % key.size(1) == 0, "some queries for each key's head")


def _attention_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, result: torch.Tensor,
    sums: torch.Tensor, *_: Any, **_options: Any,
) -> None:  # fmt: skip
    _attention(query, key, value)
    _require(gradient.shape == result.shape == query.shape, "a gradient for each number of the result")
    _require(sums.shape == query.shape[:3], "the sum of each query's row")


def _noise(x: torch.Tensor, noise: torch.Tensor, *_: Any, out: Any = None, **_options: Any) -> None:
    _require(noise.shape == x.shape and (out is None or out.shape == x.shape), "noise and a result of its shape")
    _spread_out(noise, out)


def _finite(x: torch.Tensor, **_out: Any) -> None:
    _require(bool(x.isfinite().all()), "numbers that are neither infinite nor NaN")


def _along(x: torch.Tensor, *rest: Any, **options: Any) -> None:
    written = [options[name] for name in ("values", "indices") if name in options]
    own = all(out.untyped_storage()._cdata != x.untyped_storage()._cdata for out in written)
    _require(own, "outputs other than its operand, which they would be resized under")
    dim = rest[0] if rest else options.get("dim")
    if dim is not None and x.dim() > 0 and x.device.type == "cpu" and -x.dim() <= dim < x.dim():
        _require(x.size(dim) <= 1 or x.stride(dim) != 0, "an operand that is not expanded: x.contiguous()")


def _quotient(x: Any, other: Any, *, rounding_mode: str | None = None, **_out: Any) -> None:
    if rounding_mode == "trunc" and x.device.type == "cpu":
        dtype = torch.result_type(x, other)
        if dtype in (torch.int32, torch.int64):  # what the processor itself refuses to divide
            least = torch.iinfo(dtype).min
            beyond = (torch.as_tensor(other).to(dtype) == -1) & (x.to(dtype) == least)
            _require(not bool(beyond.any()), f"a quotient of {least} by something else than -1")


def _multiple(x: torch.Tensor, other: torch.Tensor, **_out: Any) -> None:
    dtype = torch.result_type(x, other)
    if x.device.type == "cpu" and dtype in (torch.int32, torch.int64):
        least = torch.iinfo(dtype).min
        _require(not any(bool((each.to(dtype) == least).any()) for each in (x, other)), f"numbers above {least}")


def _alike(gradient: torch.Tensor, x: torch.Tensor, **_options: Any) -> None:
    _require(gradient.shape == x.shape and gradient.dtype == x.dtype, "a gradient for each number")


def _random_bounds(*arguments: Any, **options: Any) -> None:
    """Require bounds that the kernel, which adds or takes away one and halves its way to 0, comes to an end with."""
    _require(all(not isinstance(bound, int) or bound != -LAST for bound in (*arguments, *options.values())), "a bound")


def _random_from(x: torch.Tensor, first: int, *rest: Any, **options: Any) -> None:
    _random_bounds(first, *rest, **options)
    _require(first < LAST, "a first number with another after it")


def _chunks(tensors: Tensors, dim: int, count: int, **_out: Any) -> None:
    _require(count > 0 and all(-t.dim() <= dim < t.dim() for t in tensors), "tensors that have the dimension")


def _repeats(repeats: torch.Tensor, **_options: Any) -> None:
    _within(repeats, MAX_ELEMENTS + 1)
    if repeats.device.type == "cpu":
        _require(float(repeats.double().sum()) <= MAX_ELEMENTS, "repeats whose sum is not beyond all memory")


def _counted(count: torch.Tensor, *_: Any, **_out: Any) -> None:
    _require(not bool(count.isnan().any()), "counts that are numbers")


def _polynomial(_x: Any, degree: Any, **_out: Any) -> None:
    most = degree.max() if isinstance(degree, torch.Tensor) and degree.numel() else degree
    if not isinstance(degree, torch.Tensor) or degree.numel():
        _require(not bool(most > MAX_DEGREE), f"a degree of at most {MAX_DEGREE}")


def _zeta(_x: Any, start: Any, **_out: Any) -> None:
    start = torch.as_tensor(start)
    if start.is_floating_point():
        far = (start < -MAX_DEGREE) & (start != start.floor())
        _require(not bool(far.any()), f"a second argument that is whole, or not below {-MAX_DEGREE}")


def _polygamma(order: Any, x: Any, **_out: Any) -> None:
    order, x = (x, order) if isinstance(order, torch.Tensor) else (order, x)  # in place, the operand comes first
    if order > 1:
        _zeta(None, x)


def _within(indices: torch.Tensor, count: int, *, least: int = 0) -> None:
    """Require indices from `least` up to `count`, which is none."""
    if indices.device.type == "cpu" and indices.numel():
        smallest, largest = indices.aminmax()
        _require(int(smallest) >= least and int(largest) < count, f"indices from {least} to {count - 1}")


def _ascending(offsets: torch.Tensor, count: int) -> None:
    _within(offsets, count + 1)
    if offsets.device.type == "cpu":
        _require(bool((offsets.diff() >= 0).all()), "offsets that ascend")


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


def _update_statistics(x: torch.Tensor, mean: Any, variance: Any, *_: Any, **_out: Any) -> None:
    _by_channel(x, mean, variance)


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
            _require(tensor.shape == parameter.shape, "tensors of the same shapes")
            _spread_out(tensor)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Return whether the numbers that a tensor shows are those that lie at its address, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected and tensor.numel():
                return False
            expected *= size
    return True


def _spread_out(*tensors: torch.Tensor | None) -> None:
    """Require tensors with as many numbers in their storage as they show: a kernel walks through by the address."""
    for tensor in tensors:
        if tensor is not None:
            reach = (int(tensor.storage_offset()) + tensor.numel()) * tensor.itemsize
            _require(reach <= tensor.untyped_storage().nbytes(), "tensors that repeat no number")


def _group_norm(x: torch.Tensor, weight: Any, bias: Any, *_: Any, **_out: Any) -> None:
    _spread_out(x, weight, bias)


def _group_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor, weight: Any,
    *rest: Any, **_out: Any,
) -> None:  # fmt: skip
    _spread_out(gradient, x, mean, deviation, weight)
    wanted = rest[-1]
    _require(wanted[0] or x.is_contiguous() or x.device.type != "cpu", "channels first, or a gradient for its input")


def _one_number_each(parameters: Tensors, steps: Tensors) -> None:
    counted = len(steps) == len(parameters) and all(step.numel() == 1 for step in steps)
    _require(counted, "one step number for each parameter")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"it needs {what}")


_POLYNOMIALS = (
    *(f"{shifted}chebyshev_polynomial_{kind}" for shifted in ("", "shifted_") for kind in "tuvw"),
    *("hermite_polynomial_h", "hermite_polynomial_he", "laguerre_polynomial_l", "legendre_polynomial_p"),
)
_GUARDS: dict[str, Callable[..., None]] = {
    **{f"reflection_pad{dims}d_backward": _padding(dims) for dims in (1, 2, 3)},
    **{f"replication_pad{dims}d_backward": _padding(dims) for dims in (1, 2, 3)},
    **{f"fractional_max_pool{dims}d_backward": _fractional_pool(dims) for dims in (2, 3)},
    **dict.fromkeys(("convolution", "convolution_backward"), _convolution),
    **dict.fromkeys(("_linalg_svd.U", "_linalg_eigh.eigenvalues", "linalg_eig.out", "linalg_qr.out"), _apart),
    **dict.fromkeys(
        ("_fused_moving_avg_obs_fq_helper", "_fused_moving_avg_obs_fq_helper_functional"),
        _observed,
    ),
    **dict.fromkeys(("_fft_r2c", "_fft_c2c", "_fft_c2r"), _fourier),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data"), _same_shapes),
    **dict.fromkeys(("_batch_norm_no_update", "_native_batch_norm_legit_no_training"), _known_statistics),
    **dict.fromkeys(("_batch_norm_with_update", "_batch_norm_with_update_functional"), _known_statistics),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit"), _batch_norm),
    "_native_batch_norm_legit_functional": _batch_norm,
    **dict.fromkeys(("native_batch_norm_backward", "batch_norm_backward"), _batch_norm_backward),
    "batch_norm_update_stats": _update_statistics,
    **dict.fromkeys(("grid_sampler_2d_backward", "grid_sampler_3d_backward"), _grid),
    "multi_margin_loss_backward": _margins(3),
    "multilabel_margin_loss_backward": _margins(0),
    **{f"avg_pool{dims}d_backward": _pooled(dims, False) for dims in (2, 3)},
    **{f"{how}_pad{dims}d": _pads(dims) for how in ("reflection", "replication") for dims in (1, 2, 3)},
    "unfold_backward": _unfolded,
    "native_layer_norm_backward": _layer_norm,
    **dict.fromkeys(("lu_unpack", "linalg_lu_solve"), _pivots),
    "linalg_ldl_solve": _pivots_of_blocks,
    "range": _range,
    **{f"_adaptive_avg_pool{dims}d_backward": _pooled(dims, False, least=0) for dims in (2, 3)},
    "adaptive_avg_pool3d_backward": _pooled(3, False, least=0),
    "adaptive_max_pool2d_backward": _pooled(2, True),
    "adaptive_max_pool3d_backward": _consecutive_pool,
    **{f"max_pool{dims}d_with_indices_backward": _pooled(dims, True) for dims in (2, 3)},
    **dict.fromkeys(("nll_loss_backward", "nll_loss2d_backward"), _classes),
    "_ctc_loss": _ctc,
    "_ctc_loss_backward": _ctc_backward,
    "embedding_dense_backward": _embedding_backward,
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), _bags),
    "_embedding_bag_dense_backward": _bags_backward,
    "_embedding_bag_backward": _bags_backward_by_offsets,
    "_embedding_bag_per_sample_weights_backward": _bag_weights_backward,
    "segment_reduce": _segments,
    "_segment_reduce_backward": _segments_backward,
    "_cdist_backward": _distances_backward,
    "_pdist_backward": _pair_distances_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    **dict.fromkeys(("rrelu_with_noise", "rrelu_with_noise_", "rrelu_with_noise_functional"), _noise),
    "native_group_norm": _group_norm,
    "native_group_norm_backward": _group_norm_backward,
    **dict.fromkeys(("_linalg_eigvals", "linalg_eigvals"), _finite),
    **dict.fromkeys(("median", "nanmedian"), _along),
    **dict.fromkeys(("div", "div_"), _quotient),
    **dict.fromkeys(("random", "random_", "randint", "randint_like"), _random_bounds),
    **dict.fromkeys(("random.from", "random_.from"), _random_from),
    **dict.fromkeys((f"special_{name}" for name in _POLYNOMIALS), _polynomial),
    "_chunk_cat": _chunks,
    "repeat_interleave": _repeats,
    **dict.fromkeys(("lcm", "lcm_"), _multiple),
    "gelu_backward": _alike,
    "binomial": _counted,
    "special_zeta": _zeta,
    **dict.fromkeys(("polygamma", "polygamma_"), _polygamma),
    **dict.fromkeys(("_fused_adam", "_fused_adam_", "_fused_adamw", "_fused_adamw_"), _adam),
    **dict.fromkeys(("_fused_sgd", "_fused_sgd_"), _sgd),
    **dict.fromkeys(("_fused_adagrad", "_fused_adagrad_"), _adagrad),
}
