"""Calls of ops that PyTorch's own test suite makes, as a client would send them, and the same with little changed.

Most of them run to their end, so that they reach what lies behind the checks of a kernel's first lines.
"""

from __future__ import annotations

import itertools
import signal
import warnings
from collections import defaultdict
from random import Random
from typing import Any, NamedTuple

import msgspec
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode

from attacks import pool_frames
from attacks.pool_frames import Frame
from millpond.pool import codec, operators, wire

DTYPES = (torch.float32, torch.int64)
SAMPLES = 2
"""Of each operator and dtype."""
CALLS = 3
"""Of each op."""
ELEMENTS = 512
"""Of the largest tensor."""
LIMIT_S = 5
"""How long an operator's samples may take."""


class Call(NamedTuple):
    """An op's call: its uploads have the handles 0, 1, … and its operands are these in order."""

    op: str
    uploads: list[wire.Put]
    arguments: list[Any]
    keywords: dict[str, Any]


class _Unsendable(Exception):
    """An argument that no client sends."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[Call]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
        if name in operators.allowed() and len(self.calls[name]) < CALLS:
            uploads: list[wire.Put] = []
            try:
                arguments = [_sent(argument, uploads) for argument in args]
                keywords = {key: _sent(value, uploads) for key, value in kwargs.items() if key != "generator"}
            except _Unsendable:
                pass
            else:
                self.calls[name].append(Call(name, uploads, arguments, keywords))
        return func(*args, **kwargs)


def _sent(value: Any, uploads: list[wire.Put]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.numel() > ELEMENTS:
            raise _Unsendable
        plain = value.detach().resolve_conj().resolve_neg().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        uploads.append(wire.Put(len(uploads), codec.DTYPE_NAMES[value.dtype], tuple(value.shape), data))
        return wire.Operand(len(uploads) - 1)
    if isinstance(value, (list, tuple)):
        return [_sent(each, uploads) for each in value]
    if isinstance(value, torch.device):
        return wire.Symbol("device")
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        kind: Any = type(value).__name__
        return wire.Symbol(kind, str(value).removeprefix("torch."))
    if isinstance(value, complex):
        return wire.Complex(value.real, value.imag)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise _Unsendable


def record(every: int = 1) -> list[list[Call]]:
    """Return calls of some 500 ops, forward and backward, by op: two minutes; of each `every`-th operator in less."""
    recorder = _Recorder()
    ordinary = signal.signal(signal.SIGALRM, _give_up)
    try:
        for operator, dtype in itertools.product(op_db[::every], DTYPES):
            if dtype not in operator.supported_dtypes("cpu"):
                continue
            signal.alarm(LIMIT_S)
            try:
                _run_samples(operator, dtype, recorder)
            except Exception:
                continue
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, ordinary)
    return [calls for _, calls in sorted(recorder.calls.items()) if calls]


def _give_up(*_: Any) -> None:
    raise TimeoutError


def _run_samples(operator: Any, dtype: torch.dtype, recorder: _Recorder) -> None:
    differentiable = operator.supports_autograd and dtype.is_floating_point
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in itertools.islice(operator.sample_inputs("cpu", dtype, requires_grad=differentiable), SAMPLES):
            with recorder:
                result = operator(sample.input, *sample.args, **sample.kwargs)
                results = result if isinstance(result, (list, tuple)) else [result]
                sums = [each.sum() for each in results if isinstance(each, torch.Tensor) and each.requires_grad]
                if sums:
                    torch.autograd.backward([each.abs() if each.is_complex() else each for each in sums])


def altered(call: Call, chance: Random) -> Frame:
    """Return a frame that makes a call with one to three things changed."""
    uploads = list(call.uploads)
    keywords = msgspec.to_builtins(call.keywords, builtin_types=(bytes,))
    arguments = msgspec.to_builtins(call.arguments, builtin_types=(bytes,))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        what = chance.random()
        if uploads and what < 0.5:
            place = chance.randrange(len(uploads))
            uploads[place] = other_tensor(uploads[place], chance)
        elif spots := list(pool_frames.spots([arguments, keywords])):
            inner, key = chance.choice(spots)
            slot = inner[key].get("slot") if isinstance(inner[key], dict) else None
            if isinstance(slot, int) and 0 <= slot < len(uploads):
                inner[key]["view"] = msgspec.to_builtins(_repeating_view(uploads[slot], chance))
            else:
                inner[key] = pool_frames.other(inner[key], chance)
    define = ["define", 0, call.op, arguments, keywords, []]
    ask = wire.Ask(0, list(range(len(uploads))), 1000)
    return msgspec.msgpack.encode({"type": "batch", "items": [*uploads, define, ask]}), b""


def _repeating_view(upload: wire.Put, chance: Random) -> wire.View:
    """Return a view of an upload in which elements stand more than once."""
    return wire.View(upload.dtype, upload.sizes, tuple(chance.choice((0, 0, 1)) for _ in upload.sizes), 0)


def other_tensor(upload: wire.Put, chance: Random) -> wire.Put:
    """Return an upload with other indices in it, in another shape, or of another dtype."""
    name, sizes, data = upload.dtype, list(upload.sizes), upload.data
    width = codec.DTYPES[name].itemsize
    if name in ("int64", "int32") and data and chance.random() < 0.6:
        changed = bytearray(data)
        for _ in range(max(1, len(data) // width // 3)):
            at = chance.randrange(len(data) // width) * width
            number = chance.choice((3, 5, 9, 64, chance.choice(pool_frames.EDGES)))
            changed[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
        return wire.Put(upload.handle, name, upload.sizes, bytes(changed))
    place = chance.randrange(len(sizes)) if sizes else 0
    match chance.randrange(6):
        case 0 if sizes:
            sizes[place] = chance.choice((0, 1, 2, 3, 7))
        case 1 if sizes:
            del sizes[place]
        case 2:
            sizes.insert(place, chance.choice((1, 2, 0)))
        case 3:
            sizes = list(chance.choice(pool_frames.SIZES))
        case 4:
            name, data = chance.choice(pool_frames.dtypes()), b""
        case _:
            chance.shuffle(sizes)
    count = torch.Size(sizes).numel() if torch.Size(sizes).numel() <= 4 * ELEMENTS else 0
    dtype = codec.DTYPES[name]
    if count == 0:
        sizes = [0]
    if len(data) != count * dtype.itemsize:
        data = bytes(count * dtype.itemsize)
        if count and (dtype.is_floating_point or dtype == torch.int64) and dtype.itemsize >= 4:
            numbers = torch.tensor([chance.choice((1, 2, 0, 1)) for _ in range(count)])
            data = numbers.to(dtype).view(torch.uint8).numpy().tobytes()
    return wire.Put(upload.handle, name, tuple(sizes), data)
