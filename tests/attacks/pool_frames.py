"""Frames that a hostile client of a worker may send: derived from the wire's types, from the ops at hand, and from
real sessions by changing them. All of it follows from a `random.Random`, so that a seed repeats it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, get_args

import msgspec
import torch
from msgspec import inspect

from millpond.pool import codec, operators, wire
from millpond.pool.executor import _contiguous

Frame = tuple[bytes, bytes]
"""Header and payload; the prefix follows from them."""

EDGES = (0, 1, -1, 2, 3, 7, 64, 2**15, 2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**48, 2**62, 2**63 - 1, -(2**31), -(2**63))
FLOATS = (0.0, 1.0, -1.0, 0.5, 1e-45, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))
WORDS = ("", "mean", "sum", "max", "none", "zeros", "reflect", "linear", "nearest", "tanh", "left", "floor", "ij", "\0")
SIZES = ((), (0,), (1,), (4,), (8,), (2, 3), (3, 2), (4, 4), (1, 2, 3), (2, 0, 3), (1, 2, 4, 4), (1, 1, 2, 3, 3))
INDEX = re.compile(r"ind|offset|target|bag|idx|length|bins|count|repeats|pivots|seed")
"""Arguments of ops that are indices."""
HANDLES = 12
"""Handles and plans are few, so that what a session makes is what it uses."""
PLANS = 4


# --- from the wire's types: whatever message is added is covered ---------------------------------------------------

HINTS: dict[str, Callable[[Random], Any]] = {
    "op": lambda chance: chance.choice(op_names()),
    "dtype": lambda chance: chance.choice(dtypes()),
    "plan": lambda chance: chance.randrange(PLANS),
    "graph": lambda chance: chance.randrange(2),
    "slot": lambda chance: chance.randrange(3),
    "handle": lambda chance: chance.randrange(HANDLES),
    "first": lambda chance: chance.randrange(HANDLES),
    "handles": lambda chance: places(chance, HANDLES),
    "operands": lambda chance: places(chance, HANDLES),
    "outputs": lambda chance: places(chance, 6),
    "sizes": lambda chance: chance.choice(SIZES),
    "length": lambda chance: chance.randrange(70),
    "offset": lambda chance: chance.randrange(4),
    "wait_s": lambda chance: 0.0,
}
"""What gives a field of that name a meaning, so that the next check is reached."""


def places(chance: Random, most: int) -> list[int]:
    return [chance.randrange(most) for _ in range(chance.randrange(5))]


def of_type(kind: inspect.Type, chance: Random, depth: int = 4) -> Any:
    """Return a value of a type of msgspec's: often at a limit, now and then beyond it."""
    match kind:
        case inspect.UnionType():
            return of_type(chance.choice(kind.types), chance, depth)
        case inspect.StructType():
            return kind.cls(**{field.name: _of_field(field, chance, depth - 1) for field in kind.fields})
        case inspect.ListType() | inspect.VarTupleType() | inspect.CollectionType():
            count = chance.choice((0, 1, 1, 2, 3)) if depth > 0 else 0
            values = [of_type(kind.item_type, chance, depth - 1) for _ in range(count)]
            return tuple(values) if isinstance(kind, inspect.VarTupleType) else values
        case inspect.TupleType():
            return tuple(of_type(item, chance, depth - 1) for item in kind.item_types)
        case inspect.DictType():
            count = chance.choice((0, 0, 1)) if depth > 0 else 0
            return {of_type(kind.key_type, chance): of_type(kind.value_type, chance, depth - 1) for _ in range(count)}
        case inspect.IntType():
            low = kind.ge if kind.ge is not None else -(2**63)
            high = kind.le if kind.le is not None else kind.lt if kind.lt is not None else 2**63 - 1
            return chance.choice((low, high, chance.randrange(8), chance.choice(EDGES)))
        case inspect.FloatType():
            return chance.choice(FLOATS)
        case inspect.BoolType():
            return chance.random() < 0.5
        case inspect.StrType():
            if kind.pattern:
                return chance.choice(("0", "-1", str(2**64 - 1), "9" * 20))
            return chance.choice((*WORDS, "x" * min(kind.max_length or 9, 5000), "é\U0001f4a5"))
        case inspect.BytesType():
            return chance.randbytes(chance.choice((kind.min_length or 0, 8, 16, 32, chance.randrange(600))))
        case inspect.LiteralType():
            return chance.choice(kind.values)
        case inspect.NoneType():
            return None
    raise NotImplementedError(f"the fuzzer makes no {kind}: teach it")


def _of_field(field: inspect.Field, chance: Random, depth: int) -> Any:
    hint = HINTS.get(field.name)
    if hint is not None and chance.random() < 0.85:
        return hint(chance)
    return of_type(field.type, chance, depth)


@functools.cache
def _type_of(kind: Any) -> inspect.Type:
    return inspect.type_info(kind)


def any_message(direction: wire.Direction, chance: Random) -> wire.Message:
    """Return a message of a direction."""
    message: wire.Message = of_type(_type_of(MESSAGES[direction]), chance)
    return message


MESSAGES: dict[wire.Direction, Any] = {
    "greeting": wire.Greeting,
    "to-worker": wire.ToWorker,
    "from-worker": wire.FromWorker,
    "to-job": wire.ToJob,
    "from-job": wire.FromJob,
    "to-peer": wire.ToPeer,
    "from-peer": wire.FromPeer,
    "to-broker": wire.ToBroker,
    "from-broker": wire.FromBroker,
    "to-host": wire.ToHost,
    "from-host": wire.FromHost,
}


# --- from the ops at hand ------------------------------------------------------------------------------------------


@functools.cache
def op_names() -> list[str]:
    """Return what can be called."""
    return sorted(operators.allowed())


@functools.cache
def dtypes() -> list[str]:
    """Return names of dtypes, the common ones more than once."""
    common = ["float32"] * 12 + ["int64"] * 8 + ["float64", "int32", "uint8", "bool"] * 2
    return common + [name for name, dtype in codec.DTYPES.items() if dtype.itemsize]


def tensor(chance: Random, handle: int, sizes: tuple[int, ...]) -> wire.Put:
    """Return an upload: ordinary numbers, or indices of which some lie outside of everything."""
    name = "float32" if handle < 4 else "int64" if handle < 7 else chance.choice(dtypes())
    dtype = codec.DTYPES[name]
    count = torch.Size(sizes).numel()
    if dtype in (torch.int64, torch.int32):
        width = dtype.itemsize
        numbers = [chance.choice((0, 1, 2, chance.choice(EDGES))) for _ in range(count)]
        data = b"".join((number % 2 ** (8 * width)).to_bytes(width, "little") for number in numbers)
    elif dtype.is_floating_point and dtype.itemsize >= 4:
        data = torch.tensor([chance.choice((0.5, -2.0, 3.0, chance.choice(FLOATS))) for _ in range(count)], dtype=dtype)
        data = data.numpy().tobytes()
    else:
        data = chance.randbytes(count * dtype.itemsize)
    return wire.Put(handle, name, sizes, data)


def call(op: str, chance: Random, plan: int) -> tuple[wire.Define, wire.Ask | wire.Call]:
    """Return an op with arguments of the kinds that it takes, and of all values."""
    found = operators.resolve(op)
    operands: list[int] = []
    small = chance.random() < 0.5  # numbers like a program's, and hostile tensors; or hostile numbers as well

    def argument(kind: str, name: str) -> Any:
        if kind.startswith("Optional[") or kind.endswith("?"):
            kind = kind.removeprefix("Optional[").removesuffix("]").removesuffix("?")
            if chance.random() < 0.5:
                return None
        if kind.startswith("List["):
            return [argument(kind[5:-1], name) for _ in range(chance.choice((0, 1, 2, 2, 3, 4)))]
        if kind == "Tensor":
            known = range(HANDLES) if chance.random() < 0.3 else range(4, 7) if INDEX.search(name) else range(4)
            operands.append(chance.choice(known))
            view = None
            if chance.random() < 0.2:
                sizes = chance.choice(SIZES)
                view = wire.View(chance.choice(dtypes()), sizes, tuple(chance.choice((0, 1, 2)) for _ in sizes), 0)
            return wire.Operand(len(operands) - 1, view)
        if kind in ("int", "SymInt"):
            return chance.choice((0, 1, 1, 2, 3, -1)) if small else chance.choice(EDGES)
        if kind in ("float", "number", "Scalar", "SymFloat"):
            return chance.choice((0, 1, 2, 0.5)) if small else chance.choice((*FLOATS, *EDGES))
        if kind in ("bool", "SymBool"):
            return chance.random() < 0.5
        if kind == "str":
            return chance.choice(WORDS)
        if kind == "Device":
            return wire.Symbol("device")
        names = {"ScalarType": ("dtype", codec.DTYPES), "Layout": ("layout", codec.LAYOUTS)}
        names |= {"MemoryFormat": ("memory_format", codec.MEMORY_FORMATS)}
        if kind in names:
            return wire.Symbol(names[kind][0], chance.choice(sorted(names[kind][1])))  # type: ignore[arg-type]
        return None

    arguments: list[Any] = []
    keywords: dict[str, Any] = {}
    for formal in found._schema.arguments if found is not None else ():
        if formal.has_default_value() and chance.random() < 0.4 and (formal.kwarg_only or keywords):
            continue
        value = argument(str(formal.real_type if chance.random() < 0.97 else formal.type), formal.name)
        if formal.kwarg_only or keywords:
            keywords[formal.name] = value
        else:
            arguments.append(value)
    beliefs = [wire.Geometry(chance.choice(dtypes()), (4,), (1,))] if chance.random() < 0.2 else []
    kind = wire.Call if chance.random() < 0.2 else wire.Ask
    return wire.Define(plan, op, arguments, keywords, beliefs), kind(plan, operands, chance.randrange(HANDLES))


def op_batches(chance: Random) -> Iterator[list[wire.Item]]:
    """Yield uploads, then calls of ops on them and on what came of them, now and then one as a graph."""
    alike = [chance.choice(SIZES)] if chance.random() < 0.4 else SIZES  # often it is that which gets past the checks
    uploads = [tensor(chance, handle, chance.choice(alike)) for handle in range(HANDLES)]
    yield list(uploads)
    for _ in range(chance.randrange(5, 30)):
        define, start = call(chance.choice(op_names()), chance, chance.randrange(PLANS))
        if chance.random() < 0.9:
            yield [define, start]
        else:
            inputs = [wire.Geometry(put.dtype, put.sizes, _contiguous(put.sizes)) for put in uploads]
            step = wire.Step(define.plan, start.operands, results=define.results)
            captured = wire.DefineGraph(0, inputs, [step], [HANDLES] if define.results else [])
            yield [define, captured, *uploads, wire.Run(0, list(range(HANDLES)), HANDLES)]


# --- from what is well meant ---------------------------------------------------------------------------------------


def well_meant() -> list[Frame]:
    """Return the frames of a small training step, as a client would send it: op by op, then captured."""
    square = wire.Geometry("float32", (4, 4), (4, 1))
    two = [wire.Operand(0), wire.Operand(1)]
    back = [wire.Operand(0, wire.View("float32", (4, 4), (1, 4), 0)), wire.Operand(1)]
    first: list[wire.Item] = [
        wire.Seed(wire.BigInt("17")),
        wire.Put(0, "float32", (4, 4), bytes(64)),
        wire.Put(1, "float32", (4, 4), b"\0\0\x80\x3f" * 16),
        wire.Put(2, "int64", (4,), b"".join(bytes([i, 0, 0, 0, 0, 0, 0, 0]) for i in range(4))),
        wire.Define(0, "aten::mm", two, {}, [square]),
        wire.Define(1, "aten::add_.Tensor", two, {"alpha": wire.Slot(0)}, []),
        wire.Define(2, "aten::mm", back, {}, [square]),
        wire.Define(3, "aten::embedding", [wire.Operand(0), wire.Operand(1)], {}, [square]),
        wire.Call(0, [0, 1], 3),
        wire.Call(2, [0, 3], 4),
        wire.Call(1, [1, 4], 5, [0.1]),
        wire.Call(3, [1, 2], 6),
    ]
    captured: list[wire.Item] = [
        wire.DefineGraph(
            0,
            [square, square, wire.Geometry("int64", (4,), (1,))],
            [wire.Step(0, [0, 1]), wire.Step(3, [3, 2]), wire.Step(0, [4, 1])],
            [5],
        ),
        wire.Run(0, [0, 1, 2], 7),
        wire.Read(7, 0, 64),
        wire.Free([3, 4, 6, 7]),
        wire.GetUsage(),
        wire.Synchronize(),
    ]
    write = wire.Batch([wire.Write(0, 0)])
    batches = [(wire.Batch(first), b""), (write, bytes(range(64))), (wire.Batch(captured), b"")]
    return [(wire.encode(batch)[wire.PREFIX.size :], payload) for batch, payload in batches]


def with_other_bytes(frame: Frame, chance: Random) -> Frame:
    """Return a frame with bytes changed, doubled, or left out."""
    header = bytearray(frame[0])
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(header) + 1)
        what = chance.randrange(4)
        if what == 0:
            header[at : at + 1] = bytes([chance.randrange(256)])
        elif what == 1:
            del header[at : at + chance.randrange(1, 9)]
        elif what == 2:
            header[at:at] = header[at : at + chance.randrange(1, 40)]
        else:
            header[at : at + 1] = chance.choice(
                (b"\xff", b"\xc0", b"\xdd\xff\xff\xff\xff", b"\xcf" + b"\xff" * 8, b"\x7f")
            )
    return bytes(header), frame[1]


def with_other_values(frame: Frame, chance: Random) -> Frame:
    """Return a frame that still is MessagePack, with one value changed for another."""
    tree = msgspec.msgpack.decode(frame[0])
    found = list(spots(tree))
    for _ in range(chance.choice((1, 1, 1, 2))):
        inner, key = chance.choice(found)
        if isinstance(inner, list) and chance.random() < 0.2:
            inner.insert(key, inner[chance.randrange(len(inner))] if inner else None)
            found = list(spots(tree))
            continue
        old = inner[key] if not isinstance(inner, list) or key < len(inner) else None
        new = other(old, chance)
        if isinstance(inner, list) and key >= len(inner):
            inner.append(new)
        else:
            inner[key] = new
    return msgspec.msgpack.encode(tree), frame[1]


def other(old: Any, chance: Random) -> Any:
    """Return another value of about the same kind."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return chance.choice((old + 1, max(old - 1, 0), *EDGES[:6], chance.choice(EDGES)))
    if isinstance(old, str):
        return chance.choice((chance.choice(op_names()), chance.choice(dtypes()), *WORDS))
    if isinstance(old, float):
        return chance.choice(FLOATS)
    if isinstance(old, list) and old:
        return [*old, chance.choice(old)] if chance.random() < 0.5 else old[:-1]
    return chance.choice((None, 0, "", [], {}, b"", 1.5))


def spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield where a value stands in nested lists and maps: what it is in, and its place or key there."""
    if isinstance(tree, (list, dict)):
        for key, value in list(enumerate(tree) if isinstance(tree, list) else tree.items()):
            yield tree, key
            yield from spots(value)


# --- sessions ------------------------------------------------------------------------------------------------------


WAYS = ("types", "values", "bytes", "mixed", "ops")
"""Where the frames of a session come from: the wire's types, or a well-meant session changed; or ops are called."""
SAMPLES = "samples"
"""A further way: calls that PyTorch's own test suite makes, with little changed; see pool_samples.py."""


def session(chance: Random, recorded: Sequence[Frame], way: str | None = None) -> Iterator[Frame]:
    """Yield the frames of one hostile session; `recorded` are those of a well-meant one."""
    way = way or chance.choice(WAYS)
    if way == "ops":
        for items in op_batches(chance):
            yield _encoded(items, chance)
        return
    if way == "values":
        hurt = chance.randrange(len(recorded))
        for place, frame in enumerate(recorded):
            yield with_other_values(frame, chance) if place == hurt else frame
        return
    if way == "mixed":
        yield from recorded
    for _ in range(chance.randrange(1, 12)):
        if way == "types" or (way == "mixed" and chance.random() < 0.5):
            yield _encoded([of_type(_type_of(wire.Item), chance) for _ in range(chance.randrange(4))], chance)
        elif way == "mixed":
            yield with_other_values(chance.choice(recorded), chance)
        else:
            yield with_other_bytes(chance.choice(recorded), chance)


def _encoded(items: list[wire.Item], chance: Random) -> Frame:
    payload = chance.randbytes(chance.randrange(1, 80)) if chance.random() < 0.1 else b""
    return wire.encode(wire.Batch(items))[wire.PREFIX.size :], payload


assert set(MESSAGES) == set(get_args(wire.Direction))
