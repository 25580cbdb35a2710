"""A process under a lease that holds the pool device to plain CPU, one case after another.

A case is an operator, module or optimizer of `torch.testing._internal`, by database, name and dtype; on the pool, a
"compiled" module or optimizer goes through `torch.compile`. Cases come as JSON lines on stdin; for each, one line with
what came of it goes out. It may die at any of them: see sweep.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_optimizers import optim_db
from torch.utils._pytree import tree_leaves, tree_map

from millpond.pool import wire
from millpond.pool.errors import ConnectionLost
from millpond.pool.session import Session
from millpond.pool.tensors import device_of

POOL = torch.device("pool:0")
CPU = torch.device("cpu")
SEED = 7
STEPS = 4
"""Steps that an optimizer takes."""
UNDEFINED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
"""Operators whose values are whatever was in memory: only geometry is compared."""
ON_HOST = ("tensor_split",)
"""Operators whose samples make further tensors in the host's memory, on whatever device they are."""
EITHER = {torch.float16: (1e-2, 1e-2), torch.bfloat16: (2e-2, 2e-2)}
"""Tolerances (relative, absolute) where PyTorch's own for equal kernels are too strict for another memory layout."""


class Wrong(Exception):
    """The pool gave something else than plain CPU."""


class Trips:
    """Counts the round trips of a session."""

    count = 0

    @classmethod
    def install(cls) -> None:
        """Count every request from now on."""
        requests = Session.requests

        def counted(self: Session, items: list[wire.Item], *rest: Any) -> Any:
            cls.count += not isinstance(items[0], wire.GetRandomState)  # the databases' own keeping of random states
            return requests(self, items, *rest)

        Session.requests = counted  # type: ignore[method-assign]


class Uncaptured(logging.Handler):
    """Keeps what the log says of parts that run op by op although they were compiled."""

    reasons: ClassVar[dict[str, None]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.reasons[record.getMessage()] = None


def main() -> None:
    """Answer cases until stdin ends or the worker is gone."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Trips.install()
    logging.getLogger("millpond.pool").addHandler(Uncaptured())
    for line in sys.stdin:
        case = json.loads(line)
        result = run(case) if "name" in case else {"names": names(case["kind"], getattr(torch, case["dtype"]))}
        answers.write(json.dumps({**case, **result}) + "\n")
        if result.get("lost"):
            return


def names(kind: str, dtype: torch.dtype) -> list[str]:
    """Return the cases of a database that plain CPU has for a dtype."""
    if kind == "operator":
        return [op.full_name for op in op_db if op.supports_dtype(dtype, "cpu")]
    if kind.endswith("module"):
        return [info.name for info in module_db if dtype in info.dtypes]
    return [info.optim_cls.__name__ for info in optim_db] if dtype.is_floating_point else []


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Return the outcome of a case: pass, wrong, error or skipped, with samples, message and round trips."""
    checks: dict[str, Callable[[str, torch.dtype, int], Iterator[Check]]] = {
        "operator": operator_checks,
        "module": module_checks,
        "optimizer": optimizer_checks,
        "compiled module": partial(module_checks, compiled=True),
        "compiled optimizer": partial(optimizer_checks, compiled=True),
    }
    samples, trips = 0, [0, 0]
    message, outcome = "", ""
    Uncaptured.reasons.clear()
    try:
        for check in checks[case["kind"]](case["name"], getattr(torch, case["dtype"]), case["samples"]):
            try:
                used = check()
            except Skip:
                continue
            samples += 1
            trips = [max(pair) for pair in zip(trips, used, strict=True)]
    except ConnectionLost as error:
        return {"outcome": "crash", "message": str(error)[:500], "lost": True}
    except Wrong as error:
        outcome, message = "wrong", str(error)
    except Exception as error:
        outcome, message = "error", f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):
            torch.pool.synchronize()  # type: ignore[attr-defined]  # what else failed belongs to this case
    outcome = outcome or ("pass" if samples else "skipped")
    message = message or "; ".join(Uncaptured.reasons)
    return {"outcome": outcome, "message": message[:1500], "passed": samples, "forward": trips[0], "backward": trips[1]}


class Skip(Exception):
    """Plain CPU cannot do this sample."""


Check = Callable[[], tuple[int, int]]
"""Compares one sample; returns the round trips of forward and backward."""


def operator_checks(name: str, dtype: torch.dtype, most: int) -> Iterator[Check]:
    """Yield a check for each sample of an operator."""
    op = next(op for op in op_db if op.full_name == name)
    differentiable = op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
    torch.manual_seed(SEED)
    for sample in choose(op.sample_inputs("cpu", dtype, requires_grad=differentiable), most):
        call = (sample.input, sample.args, sample.kwargs)

        def work(call: Any) -> Any:
            value, args, kwargs = call
            return op(value, *args, **kwargs)

        yield lambda call=call: compare(work, call, undefined=name in UNDEFINED, on_host=name in ON_HOST)  # type: ignore[misc]
        inplace = op.inplace_variant
        if inplace is not None and isinstance(sample.input, torch.Tensor) and not sample.broadcasts_input:

            def work_in_place(call: Any, inplace: Any = inplace) -> Any:
                value, args, kwargs = call
                with torch.no_grad():
                    return inplace(value, *args, **kwargs), value

            yield lambda call=call, work=work_in_place: compare(work, call)  # type: ignore[misc]


def module_checks(name: str, dtype: torch.dtype, most: int, *, compiled: bool = False) -> Iterator[Check]:
    """Yield a check for each sample of a module, in training and in evaluation."""
    info = next(info for info in module_db if info.name == name)
    for training in (True, False) if info.train_and_eval_differ else (True,):
        torch.manual_seed(SEED)
        inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
        for sample in choose(inputs, most):

            def check(sample: Any = sample, training: bool = training) -> tuple[int, int]:
                if sample.forward_input is None:
                    raise Skip
                construct, forward = sample.constructor_input, sample.forward_input
                modules: dict[str, torch.nn.Module] = {}
                for device in (CPU, POOL):
                    torch.manual_seed(SEED)
                    module = info.module_cls(*construct.args, **construct.kwargs).to(dtype).train(training)
                    modules[device.type] = module.to(device)

                answers: dict[str, Any] = dict(modules)
                if compiled:
                    torch.compiler.reset()  # else the next module of a class may be one too many to compile
                    answers[POOL.type] = torch.compile(modules[POOL.type])

                def work(call: Any) -> Any:
                    args, kwargs, here = call
                    kind = CPU.type if here.device == CPU else POOL.type
                    result = answers[kind](*args, **kwargs)
                    return result, [buffer.clone() for buffer in modules[kind].buffers()]

                call = (forward.args, forward.kwargs, torch.empty(0))
                times = 3 if compiled else 1
                return compare(work, call, others=lambda here: weights(modules[here.type]), times=times)

            yield check


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """Return the parameters that there are already: a lazy module's come with its first batch."""
    return [weight for weight in module.parameters() if not torch.nn.parameter.is_lazy(weight)]


def optimizer_checks(name: str, dtype: torch.dtype, most: int, *, compiled: bool = False) -> Iterator[Check]:
    """Yield a check for each configuration of an optimizer: plain, foreach and fused."""
    info = next(info for info in optim_db if info.optim_cls.__name__ == name)
    for sample in choose(info.optim_inputs_func(device="cpu"), most):
        for flag in ("", *info.supported_impls):
            if flag in ("for-loop", "capturable", "differentiable"):
                continue

            def check(sample: Any = sample, flag: str = flag) -> tuple[int, int]:
                kwargs = {**sample.kwargs, **({flag: True} if flag else {})}
                results, trips = [], 0
                for device in (CPU, POOL):
                    before = Trips.count
                    results.append(_train(info, kwargs, dtype, device, compiled=compiled and device == POOL))
                    trips = Trips.count - before
                same(results[1], results[0], f"{flag or 'plain'} {kwargs}")
                return trips // STEPS, 0

            yield check


def _train(
    info: Any, kwargs: dict[str, Any], dtype: torch.dtype, device: torch.device, *, compiled: bool
) -> list[torch.Tensor]:
    torch.manual_seed(SEED)
    sparse = info.only_supports_sparse_grads
    if sparse:
        model: Any = torch.nn.Embedding(7, 3, sparse=True, dtype=dtype)
        inputs = torch.tensor([1, 2, 2, 5])
    else:
        model = torch.nn.Linear(4, 3, bias=info.optim_cls.__name__ != "Muon", dtype=dtype)
        inputs = torch.randn(5, 4, dtype=dtype)
    model, inputs = model.to(device), inputs.to(device)
    try:
        optimizer = info.optim_cls(model.parameters(), **kwargs)
    except (ValueError, RuntimeError) as error:
        if device == CPU:
            raise Skip from error
        raise

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(inputs).pow(2).sum()
        loss.backward()
        return loss

    if compiled:
        torch.compiler.reset()
    step = torch.compile(optimizer.step) if compiled else optimizer.step
    own_backward = compiled and info.optim_cls.__name__ != "LBFGS"  # a closure is nothing that PyTorch compiles well
    for _ in range(STEPS):
        try:
            if own_backward:
                closure()
                step()
            else:
                step(closure)
        except Exception as error:
            if device == CPU:
                raise Skip from error
            raise
    return [parameter.detach() for parameter in model.parameters()]


def choose(samples: Iterable[Any], most: int) -> list[Any]:
    """Return all samples, or `most` spread evenly over them."""
    try:
        found = list(samples)
    except Exception as error:
        if isinstance(error, ConnectionLost):
            raise
        return []  # its samples need something that this machine lacks
    if not most or len(found) <= most:
        return found
    return [found[place * len(found) // most] for place in range(most)]


def compare(
    work: Callable[[Any], Any],
    call: Any,
    *,
    undefined: bool = False,
    on_host: bool = False,
    others: Callable[[torch.device], list[torch.Tensor]] = lambda here: [],
    times: int = 1,
) -> tuple[int, int]:
    """Do the work on CPU and on the pool, a number of times; raise Wrong if results or gradients differ.

    Returns the round trips of forward and backward on the pool.
    """
    for _ in range(times):
        inputs = to_device(call, CPU)
        try:
            expected = evaluate(work, inputs, others(CPU))
        except Exception as error:
            raise Skip from error
        inputs = to_device(call, POOL, arguments=not on_host)
        torch.pool.synchronize()  # type: ignore[attr-defined]
        found = evaluate(work, inputs, others(POOL))
        same(found[0], expected[0], "result", values=not undefined)
        same(found[1], expected[1], "gradient", values=not undefined)
    if found[2] or found[3]:  # some only the first time: count what every further call costs
        found = evaluate(work, to_device(call, POOL, arguments=not on_host), others(POOL))
    return found[2], found[3]


def evaluate(work: Callable[[Any], Any], inputs: Any, others: list[torch.Tensor]) -> tuple[Any, Any, int, int]:
    """Return results, gradients of all inputs that want one, and the round trips of both."""
    torch.manual_seed(SEED)
    before = Trips.count
    result = work(inputs)
    forward = Trips.count - before
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    outputs = [leaf for leaf in outputs if not any(leaf is other for other in others)]
    wanting = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    wanting += [other for other in others if other.requires_grad]
    gradients: Any = ()
    before = Trips.count
    if outputs and wanting:
        seeds = [_direction(leaf) for leaf in outputs]
        before = Trips.count
        gradients = torch.autograd.grad(outputs, wanting, seeds, allow_unused=True)
    return result, gradients, forward, Trips.count - before


def _direction(output: torch.Tensor) -> torch.Tensor:
    """Return a gradient of the output's shape that is not all alike."""
    values = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).add(0.1).reshape(output.shape)
    return values.to(output.dtype).to(output.device)


def to_device(value: Any, device: torch.device, *, arguments: bool = True) -> Any:
    """Return a call with every tensor (without `arguments`: the first) a new one on `device`, as it lies in memory."""
    if not arguments:
        return to_device(value[0], device), *to_device(value[1:], CPU)

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return _twin(leaf, device)
        if leaf == "cpu" or (isinstance(leaf, torch.device) and leaf.type == "cpu"):
            return device
        return leaf

    return tree_map(move, value)


def _twin(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    plain = tensor.detach()
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        new = plain.clone().to(device)
    else:
        storage = plain.untyped_storage()
        flat = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.itemsize,), (1,))
        new = flat.clone().to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return new.detach().requires_grad_(tensor.requires_grad)


def same(found: Any, expected: Any, what: str, *, values: bool = True) -> None:
    """Raise Wrong unless both are alike: structure, dtypes, shapes, values; and the found tensors are the pool's."""
    found, expected = tree_leaves(found), tree_leaves(expected)
    if len(found) != len(expected):
        raise Wrong(f"{what}: {len(found)} values instead of {len(expected)}")
    for one, other in zip(found, expected, strict=True):
        if not isinstance(other, torch.Tensor):
            alike = one == other or (one != one and other != other)
            if isinstance(other, torch.device) or not isinstance(other, (bool, int, float, complex, str, type(None))):
                continue
            if not alike and not (isinstance(other, float) and abs(one - other) <= 1e-5 * max(1, abs(other))):
                raise Wrong(f"{what}: {one} instead of {other}")
            continue
        if not isinstance(one, torch.Tensor):
            raise Wrong(f"{what}: {type(one).__name__} instead of a tensor")
        _same_tensor(one, other, what, values)


def _same_tensor(one: torch.Tensor, other: torch.Tensor, what: str, values: bool) -> None:
    geometry = (other.dtype, other.shape, other.layout, other.requires_grad)
    if (one.dtype, one.shape, one.layout, one.requires_grad) != geometry:
        shown = f"{one.dtype} {list(one.shape)} {one.layout} {one.requires_grad}"
        raise Wrong(f"{what}: {shown} instead of {geometry}")
    if device_of(one) != POOL:
        raise Wrong(f"{what}: it is on {device_of(one)}")
    if not values:
        return
    rtol, atol = EITHER.get(other.dtype, (None, None))
    try:
        torch.testing.assert_close(one.detach().cpu(), other.detach().cpu(), rtol=rtol, atol=atol, equal_nan=True)
    except AssertionError as error:
        raise Wrong(f"{what}: {error}") from None


if __name__ == "__main__":
    main()
