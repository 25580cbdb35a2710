"""From a call of an op to a plan: what it is by signature, what comes out of it, and how the worker is told.

A signature is an op with the geometry of its operands, what PyTorch keeps for the process (`numerics`) and everything
else but plain numbers.
What comes out is asked of PyTorch's meta kernels; where they cannot know, or are known to be wrong, of the worker; once
per signature, and at every call only where values decide.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch
from torch._prims_common import suggest_memory_format

from millpond.pool import codec, cuda, misfits, numerics, wire
from millpond.pool.errors import WireError
from millpond.pool.operators import new_results
from millpond.pool.tensors import Mold, Remote, remote_of

ASK = frozenset(
    {
        # Shapes by meta kernels differ from the real ones (found by tests/pool/conformance on torch 2.13).
        "aten::_embedding_bag",
        "aten::_embedding_bag_forward_only",
        "aten::native_batch_norm",
        "aten::_native_batch_norm_legit",
        "aten::_native_batch_norm_legit.no_stats",
        "aten::_native_batch_norm_legit_functional",
        "aten::_native_batch_norm_legit_no_training",
        "aten::multilabel_margin_loss_forward",
        # Of half precision: a CPU keeps the statistics in the dtype of the weights, where a meta kernel says float32.
        "aten::native_layer_norm",
        "aten::_batch_norm_with_update",
        # How much cuDNN keeps for the backward pass is its own affair.
        "aten::_cudnn_rnn",
        "aten::_cudnn_rnn_backward",
    }
)
"""Ops whose results the worker is asked for although a meta kernel claims to know them: once for each signature."""

SIZED = frozenset({"aten::_scaled_dot_product_flash_attention", "aten::_fused_sdp_choice"})
"""Ops that give numbers which follow from their operands' sizes: the worker is asked once for each signature."""

FILLS = frozenset(
    f"aten::{name}" for name in ("arange.out", "arange.start_out", "range.out", "linspace.out", "logspace.out")
)
"""Ops that fill an output of any shape that has as many elements as they give; meta kernels resize it even then."""

CONVOLUTIONS = {"aten::convolution": slice(0, 2), "aten::convolution_backward": slice(1, 3)}
"""Ops whose meta kernels leave open in which layout their results come, and where their input and weight are."""

Tensor = torch.Tensor


class Op:
    """What has to be known of an op before it is called."""

    def __init__(self, overload: torch._ops.OpOverload) -> None:
        schema = overload._schema
        self.overload = overload
        self.name = schema.name + (f".{schema.overload_name}" if schema.overload_name else "")
        self.new = new_results(overload)
        self.lists = [str(value.type) == "List[Tensor]" for value in schema.returns]
        arguments = schema.arguments
        types = [str(argument.real_type) for argument in arguments]
        self.scalar = [("number" in kind or "Scalar" in kind or "Tensor" in kind) for kind in types]
        self.scalar_named = {argument.name: s for argument, s in zip(arguments, self.scalar, strict=True)}
        self.fixed_numbers = "upsample" in self.name or "range" in self.name
        """Whether plain numbers decide what comes out, so that they belong to the signature."""
        self.by_value = (
            torch.Tag.data_dependent_output in overload.tags
            or torch.Tag.dynamic_output_shape in overload.tags
            or not all(str(value.type) in ("Tensor", "List[Tensor]", "Optional[Tensor]") for value in schema.returns)
        ) and self.name not in SIZED
        """Whether values of the operands may decide what comes out, so that the worker is asked at every call."""
        self.takes_device = any(argument.name == "device" for argument in arguments)
        self.generator = next((place for place, argument in enumerate(arguments) if argument.name == "generator"), None)
        """Where the op takes a generator, by position unless by keyword; None: nowhere."""
        self.written = [self._place_of_alias(value, arguments) for value in schema.returns]
        """For each result that is an operand written to, where that is: a position, or a keyword."""
        self.writes = [
            a.name if a.kwarg_only else place
            for place, a in enumerate(arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        self.in_place = len(self.new) == 1 and not self.new[0] and self.written[0] == 0

    @functools.cached_property
    def without_out(self) -> Op | None:
        """The same op without `out=`; None for an op that has no such arguments, or no such sibling."""
        arguments = [argument.name for argument in self.overload._schema.arguments]
        if not self.writes or not all(isinstance(name, str) for name in self.writes):
            return None
        packet = self.overload.overloadpacket
        for name in packet.overloads():
            sibling = getattr(packet, name)
            if [argument.name for argument in sibling._schema.arguments] == [
                argument for argument in arguments if argument not in self.writes
            ]:
                return Op(sibling)
        return None

    @functools.cached_property
    def outright(self) -> Op:
        """The same op, for outputs that have the shapes of its results already."""
        op = Op(self.overload)
        op.without_out = None
        return op

    @staticmethod
    def _place_of_alias(value: Any, arguments: Sequence[Any]) -> int | str | None:
        if value.alias_info is None or not value.alias_info.is_write:
            return None
        for place, argument in enumerate(arguments):
            alias = argument.alias_info
            if alias is not None and alias.is_write and alias.before_set & value.alias_info.before_set:
                return str(argument.name) if argument.kwarg_only else place
        return None

    def counts(self, results: int) -> list[int | None]:
        """Return, for each result that is new, None for one tensor, or how many a list has, of so many in all."""
        lists = [is_list for is_list, fresh in zip(self.lists, self.new, strict=True) if fresh]
        return [results - len(lists) + 1 if is_list else None for is_list in lists]

    def __str__(self) -> str:
        return self.name


class Signature:
    """A call taken apart: the key of its plan, its operands, its numbers."""

    __slots__ = ("foreign", "key", "numbers", "op", "remotes", "session")

    def __init__(self, op: Op) -> None:
        self.op = op
        self.key: list[Any] = [op.name, numerics.current()]
        self.remotes: list[Remote] = []
        self.numbers: list[Any] = []
        self.session: Any = None
        self.foreign: list[Tensor] = []
        """Operands in the host's memory that cannot travel as a number."""

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read all arguments."""
        scalars = self.op.scalar
        for place, value in enumerate(args):
            self.add(value, scalars[place])
        if kwargs:
            named = self.op.scalar_named
            for name, value in kwargs.items():
                self.key.append(name)
                self.add(value, named[name])

    def add(self, value: Any, scalar: bool) -> None:
        """Read one argument; `scalar` says whether a number there is only a number, and decides no shape."""
        key = self.key
        kind = type(value)
        if kind is Tensor or isinstance(value, Tensor):
            remote = getattr(value.untyped_storage(), "remote", None) if value.layout is torch.strided else None
            if remote is None:
                self._add_foreign(value)
                return
            geometry = (value.dtype, value.shape, value.stride(), value.storage_offset())
            whole = geometry == remote.geometry
            key.append(geometry)
            key.append(whole)
            # Asking costs as much as all the rest, and a lazy negation is mostly a part of a conjugated whole.
            if value.dtype.is_complex or not whole or remote.negated:
                key.append((value.is_neg(), value.is_conj()))
            self.remotes.append(remote)
            if self.session is not remote.session:
                self._enter(remote.session)
        elif kind is list or kind is tuple:
            key.append(len(value))
            if value and type(value[0]) is int and not scalar:
                key.append(tuple(value))
            else:
                for element in value:
                    self.add(element, scalar)
        elif kind is float or kind is complex or (scalar and (kind is int or kind is bool)):
            key.append(kind)
            if self.op.fixed_numbers:
                key.append(value)
            else:
                self.numbers.append(value)
        elif isinstance(value, torch._C.Generator):
            raise NotImplementedError(f"{self.op} takes no generator on the pool device but the default one")
        else:
            key.append(value)

    def _add_foreign(self, value: Tensor) -> None:
        if value.dim() == 0 and value.device.type == "cpu":
            self.key.append(("host", value.dtype))
            self.numbers.append(value.item())
        else:
            self.foreign.append(value)

    def _enter(self, session: Any) -> None:
        if self.session is not None:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{cuda.name(self.session.index)} and {cuda.name(session.index)}! (when calling {self.op}). "
                f"Move one first: .to('{cuda.name(self.session.index)}')."
            )
        self.session = session


class Known:
    """A number that an op gives for each call of a signature, where others have the mold of a tensor."""

    def __init__(self, number: codec.Number) -> None:
        self.number = number

    def cast(self, session: Any, handle: int) -> codec.Number:
        """Return it."""
        return self.number


def tensors_of(results: Sequence[Any]) -> list[wire.Geometry | None]:
    """Return what the worker said comes out, without what is no tensor."""
    return [result if isinstance(result, wire.Geometry) else None for result in results]


class Plan:
    """What a signature comes to: its number at the worker, and the molds of its new results."""

    __slots__ = ("ask", "counts", "define", "id", "index", "molds", "op", "refusal", "resizes", "what")

    def __init__(self, op: Op, plan_id: int, index: int) -> None:
        self.op = op
        self.id = plan_id
        self.index = index
        self.ask = op.name in ASK or op.name in SIZED
        self.refusal: str | None = None
        """Why the operands seem not to fit: the worker is asked, which says it in the op's own words."""
        self.define: wire.Define
        self.molds: list[Mold | Known | None] = []
        self.counts: list[int | None] = []
        """For each result that is new: None for one tensor, or how many a list has."""
        self.resizes: list[tuple[int | str, tuple[int, ...], tuple[int, ...]]] = []
        """Outputs whose shape is not yet what the op will make of them, with that shape and its strides."""
        self.what = ""

    def learn(self, results: Sequence[Any]) -> wire.Define:
        """Take over what the worker said comes out; return the plan's new definition, by which it need not be asked."""
        self.molds = [
            Mold(codec.dtype(result.dtype), result.sizes, result.strides, self.index)
            if isinstance(result, wire.Geometry)
            else None
            if result is None
            else Known(codec.from_number(result))
            for result in results
        ]
        self.counts = self.op.counts(len(results))
        self.ask, self.refusal = False, None
        return msgspec.structs.replace(self.define, results=tensors_of(results))

    def __str__(self) -> str:
        return self.what


def make(op: Op, plan_id: int, index: int, key: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
    """Return the plan for a call on device `index` by its signature's key; its `define` tells the worker.

    Raises:
        RuntimeError: an operand that the op writes to is in the host's memory, or the wire has no form for the call,
            such as for a tensor of more than 64 dimensions.
    """
    for place in op.writes:
        written = _argument(place, args, kwargs)
        if isinstance(written, Tensor) and remote_of(written) is None:
            raise RuntimeError(
                f"Expected out tensor to have device {cuda.name(index)}, but got {written.device} instead"
            )
    plan = Plan(op, plan_id, index)
    plan.ask |= op.by_value and not _is_known(op, args)
    plan.what = f"{op.name}({', '.join(_shown(args, kwargs))})"
    writer = _Writer(op)
    arguments = [writer.write(value, op.scalar[place]) for place, value in enumerate(args)]
    keywords = {name: writer.write(value, op.scalar_named[name]) for name, value in kwargs.items()}
    if not plan.ask:
        _infer(plan, args, kwargs)
    believed = [
        wire.Geometry(codec.DTYPE_NAMES[mold.dtype], mold.sizes, mold.strides) if isinstance(mold, Mold) else None
        for mold in plan.molds
    ]
    plan.define = wire.Define(plan_id, op.name, arguments, keywords, believed, numerics.described(key[1]))
    try:  # here, for at the worker it would end the session
        wire.decode(wire.encode(wire.Batch([plan.define]))[wire.PREFIX.size :], "to-worker")
    except WireError as error:
        raise RuntimeError(f"{plan.what} is no call that the pool can send: {error}") from None
    return plan


def _argument(place: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an argument by its position or its keyword; None if it is not given."""
    return args[place] if isinstance(place, int) and place < len(args) else kwargs.get(str(place))


def _is_known(op: Op, args: tuple[Any, ...]) -> bool:
    """Return whether values do not decide what comes out this time: numbers index, as opposed to masks."""
    return op.name == "aten::index.Tensor" and all(i is None or i.dtype not in misfits.MASKS for i in args[1])


def _infer(plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Learn from the meta kernel what comes out."""
    op = plan.op
    meta_args = tuple(on_meta(value) for value in args)
    meta_kwargs = {name: on_meta(value) for name, value in kwargs.items()}
    try:
        misfits.check(op.overload, op.name, meta_args, meta_kwargs)
        results = op.overload(*meta_args, **meta_kwargs)
    except NotImplementedError:
        plan.ask = True
        return
    except Exception as error:
        plan.ask, plan.refusal = True, str(error)
        return
    for place in op.writes:
        before = _argument(place, args, kwargs)
        after = _argument(place, meta_args, meta_kwargs)
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape == after.shape:
            continue
        if op.name not in FILLS or before.numel() != after.numel():
            plan.resizes.append((place, tuple(after.shape), after.stride()))
    if op.name in CONVOLUTIONS:
        results = _lay_out(results, convolution_format(*meta_args[CONVOLUTIONS[op.name]]))
    if plan.resizes and op.without_out is not None:
        # Real kernels give an output that they resize the strides of a new result, where meta kernels forget them.
        with contextlib.suppress(NotImplementedError):
            fresh = op.without_out.overload(*meta_args, **{n: v for n, v in meta_kwargs.items() if n not in op.writes})
            made = dict(zip(op.writes, fresh if isinstance(fresh, tuple) else (fresh,), strict=True))
            plan.resizes = [(place, sizes, made[place].stride()) for place, sizes, _ in plan.resizes]
    for value, new in zip(results if len(op.new) > 1 else (results,), op.new, strict=False):
        if not new:
            continue
        several = isinstance(value, (list, tuple))
        plan.counts.append(len(value) if several else None)
        for tensor in value if several else (value,):
            if tensor is None:
                plan.molds.append(None)
                continue
            _require_form(tensor)
            plan.molds.append(Mold(tensor.dtype, tensor.shape, tensor.stride(), plan.index))


def convolution_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Return how cuDNN and oneDNN lay out a convolution's results: channels last if its input or its weight is so."""
    formats = map(suggest_memory_format, (x, weight))
    return next((form for form in formats if form is not torch.contiguous_format), torch.contiguous_format)


def _lay_out(results: Any, form: torch.memory_format) -> Any:
    """Return what a convolution gives, or the gradients of its input and weight, in a layout; no bias has one."""
    if isinstance(results, tuple):
        return (*(_lay_out(each, form) for each in results[:2]), results[2])
    return results if results is None or results.dim() < 4 else results.to(memory_format=form)


def _require_form(tensor: Tensor) -> None:
    """Raise what PyTorch does where a tensor has more dimensions or elements than the wire takes."""
    if tensor.dim() > wire.MAX_DIMS:
        raise RuntimeError(f"only tensors with up to {wire.MAX_DIMS} dims are supported")
    if tensor.numel() > codec.MAX_ELEMENTS:
        raise torch.OutOfMemoryError(f"Pool device out of memory: none holds a tensor of {list(tensor.shape)}.")


class _Writer:
    """Writes arguments as the wire's, giving operands and numbers their slots in the order of `Signature`."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.operands = 0
        self.numbers = 0

    def write(self, value: Any, scalar: bool) -> Any:
        kind = type(value)
        if isinstance(value, Tensor):
            _require_form(value)
            remote = remote_of(value)
            if remote is None:
                return self._slot(codec.DTYPE_NAMES[value.dtype])
            self.operands += 1
            return wire.Operand(self.operands - 1, _view(value, remote))
        if kind is list or kind is tuple:
            return [self.write(element, scalar) for element in value]
        if kind is float or kind is complex or (scalar and (kind is int or kind is bool)):
            return codec.number(value) if self.op.fixed_numbers else self._slot()
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format, torch.device)):
            return codec.symbol(value)
        return value

    def _slot(self, dtype: str = "") -> wire.Slot:
        self.numbers += 1
        return wire.Slot(self.numbers - 1, dtype)


def _view(value: Tensor, remote: Remote) -> wire.View | None:
    geometry = (value.dtype, value.shape, value.stride(), value.storage_offset())
    if geometry == remote.geometry and not value.is_neg() and not value.is_conj():
        return None
    name = codec.DTYPE_NAMES[value.dtype]
    sizes, strides = tuple(value.shape), value.stride()
    return wire.View(name, sizes, strides, int(value.storage_offset()), value.is_conj(), value.is_neg())


def on_meta(value: Any) -> Any:
    """Return what looks the same and has no memory, for a tensor of the pool or what holds some."""
    if isinstance(value, Tensor):
        if remote_of(value) is None:
            return value
        offset = int(value.storage_offset())
        span = codec.span(tuple(value.shape), value.stride(), offset)
        meta = torch.empty(span, dtype=value.dtype, device="meta").as_strided(value.shape, value.stride(), offset)
        meta = torch._conj(meta) if value.is_conj() else meta
        return torch._neg_view(meta) if value.is_neg() else meta
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, (list, tuple)):
        return [on_meta(element) for element in value]
    return value


def _shown(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
    """Yield arguments as an error shows them."""
    yield from (_show(value) for value in args)
    yield from (f"{name}={_show(value)}" for name, value in kwargs.items())


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{codec.DTYPE_NAMES[value.dtype]}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_show(element) for element in value[:4])}{', …' if len(value) > 4 else ''}]"
    return str(value)
