"""A session's end at the worker: its tensors, its plans, and the running of its items.

What a client sends is checked here against what is this session's: handles, the list of ops, bounds of views, the
lease's memory. A failed item is reported once; what needed its results fails with it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from millpond.pool import codec, guards, operators, wire
from millpond.pool.errors import WireError
from millpond.pool.link import COPIED_BYTES
from millpond.pool.numerics import Setting

Getter = Callable[[Sequence[torch.Tensor], Sequence[codec.Number]], Any]


class Failure(Exception):
    """An item failed; `kind` and message go to the client."""

    def __init__(self, kind: wire.ErrorKind, message: str, item: int | None = None) -> None:
        super().__init__(message)
        self.kind: wire.ErrorKind = kind
        self.item = item
        """The item whose failure this is a consequence of, if it is not this one's own."""

    def again(self) -> Failure:
        """Return the same failure anew: one that is raised holds on to the frames, and tensors, that it passed."""
        return Failure(self.kind, str(self), self.item)


class Memory:
    """The lease's memory, shared by its sessions: counts the bytes of live tensors and refuses what goes over."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self._lock = threading.Lock()

    def check(self, more_bytes: int) -> None:
        """Raise Failure if so many bytes more would not fit."""
        if self.used_bytes + more_bytes > self.limit_bytes:
            raise Failure(
                "memory",
                f"Pool device out of memory. Tried to allocate {_mib(more_bytes)}. The lease has a total capacity of "
                f"{_mib(self.limit_bytes)} of which {_mib(self.limit_bytes - self.used_bytes)} is free. Free tensors, "
                "make batches smaller, or take a larger part: millpond pool run --memory.",
            )

    def add(self, more_bytes: int) -> None:
        """Count bytes as used, or (negative) as free again."""
        with self._lock:
            self.used_bytes += more_bytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)


class Plan:
    """An op with its constant arguments, ready to be given operands and numbers."""

    def __init__(self, define: wire.Define, device: torch.device) -> None:
        op = operators.resolve(define.op)
        if op is None:
            raise Failure("refused", f"{define.op[:100]!r} is not an op that the pool runs")
        self.name = define.op
        self.op = op
        self.new = operators.new_results(op)
        self.guard = guards.of(define.op)
        self.resizes = any(a.kwarg_only and a.alias_info is not None for a in op._schema.arguments)
        """Whether the op writes to outputs that it was given, and resizes them where they do not fit."""
        self.device = device
        self._setting = Setting(define.numerics)
        self.operands = self.numbers = 0
        """How many operands and numbers a call must bring."""
        given = _given(op, define)
        _check_symbols(define, given)
        self.writes = {
            atom.slot
            for formal, argument in given
            if formal.alias_info is not None and formal.alias_info.is_write
            for atom in (argument if isinstance(argument, list) else [argument])
            if isinstance(atom, wire.Operand)
        }
        """The operands, by their slots, that the op writes to."""
        self._arguments = [self._getter(argument) for argument in define.arguments]
        self._keywords = [(name, self._getter(argument)) for name, argument in define.keywords.items()]
        self.results = [None if result is None else Believed(result) for result in define.results]
        self.bytes = sum(result.bytes for result in self.results if result is not None)
        if not self.operands:  # what it makes must be of the device too, or nothing would limit its memory on a GPU
            if all(formal.name != "device" for formal in op._schema.arguments):
                raise Failure("refused", f"{define.op} without an operand of the session")
            self._keywords.append(("device", self._getter(wire.Symbol("device"))))

    def run(self, operands: Sequence[torch.Tensor], numbers: Sequence[codec.Number]) -> list[Any]:
        """Run the op and return its new results, flat."""
        arguments = [get(operands, numbers) for get in self._arguments]
        keywords = {name: get(operands, numbers) for name, get in self._keywords}
        with self._setting:
            if self.guard is not None:
                self.guard(*arguments, **keywords)
            result = self.op(*arguments, **keywords)
        if isinstance(result, torch.Tensor):
            return [result] if self.new[0] else []
        results: list[Any] = []
        for value, new in zip((result,) if len(self.new) == 1 else result or (), self.new, strict=True):
            if new and isinstance(value, (list, tuple)):
                results += value
            elif new:
                results.append(value)
        return results

    def _getter(self, argument: wire.Argument) -> Getter:
        if isinstance(argument, list):
            getters = [self._getter(atom) for atom in argument]
            return lambda operands, numbers: [get(operands, numbers) for get in getters]
        if isinstance(argument, wire.Operand):
            slot = argument.slot
            self.operands = max(self.operands, slot + 1)
            if argument.view is None:
                return lambda operands, numbers: operands[slot]
            view = _Viewer(argument.view)
            return lambda operands, numbers: view(operands[slot])
        if isinstance(argument, wire.Slot):
            place = argument.slot
            self.numbers = max(self.numbers, place + 1)
            if not argument.dtype:
                return lambda operands, numbers: numbers[place]
            dtype = codec.dtype(argument.dtype)
            return lambda operands, numbers: torch.tensor(numbers[place], dtype=dtype)
        if isinstance(argument, wire.Symbol):
            value: Any = codec.from_symbol(argument, self.device)
        else:
            value = codec.from_number(argument) if isinstance(argument, wire.Complex) else argument
        return lambda operands, numbers: value


class Believed:
    """What the client believes of a result."""

    def __init__(self, geometry: wire.Geometry) -> None:
        self.dtype = codec.dtype(geometry.dtype)
        self.sizes = geometry.sizes
        self.strides = geometry.strides
        self.bytes = codec.extent(geometry.sizes, geometry.strides) * self.dtype.itemsize
        self._is_own = False
        """Whether the first result came in storage of its own: so do all, as that depends on the op and its operands'
        geometries."""

    def is_of(self, result: Any) -> bool:
        """Return whether a result has the believed dtype, sizes and strides."""
        return (
            isinstance(result, torch.Tensor)
            and result.dtype == self.dtype
            and result.shape == self.sizes
            and result.layout is torch.strided
            and result.stride() == self.strides
        )

    def fit(self, result: Any, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the result in the memory layout that the client believes in, in storage of its own."""
        if self._is_own and self.is_of(result):
            return result  # type: ignore[no-any-return]
        if not isinstance(result, torch.Tensor):
            raise Failure("geometry", f"the result is {type(result).__name__}, not a tensor as the client believes")
        if result.dtype != self.dtype or tuple(result.shape) != self.sizes:
            raise Failure(
                "geometry",
                f"the result is {result.dtype} {list(result.shape)} where the client believes {self.dtype} "
                f"{list(self.sizes)}. This is a defect of millpond: the op belongs on its list of ops to ask for.",
            )
        storage = result.untyped_storage()
        if (
            result.layout is torch.strided
            and result.stride() == self.strides
            and result.storage_offset() == 0
            and storage.nbytes() == self.bytes
            and not result.is_conj()
            and not result.is_neg()
            and all(storage._cdata != operand.untyped_storage()._cdata for operand in operands)
        ):
            self._is_own = True
            return result
        own = torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device=result.device)
        return own.copy_(result)


class _Viewer:
    """Makes the view of a storage that an operand is."""

    def __init__(self, view: wire.View) -> None:
        self.view = view
        self.dtype = codec.dtype(view.dtype)
        self.bytes = codec.extent(view.sizes, view.strides, view.offset) * self.dtype.itemsize

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        view = self.view
        storage = tensor.untyped_storage()
        if self.bytes > storage.nbytes():
            raise Failure("refused", f"a view of {self.bytes} bytes reaches beyond its storage of {storage.nbytes()}")
        if tensor.dtype is self.dtype:
            tensor = tensor.as_strided(view.sizes, view.strides, view.offset)
        else:
            tensor = torch.empty(0, dtype=self.dtype, device=tensor.device).set_(
                storage, view.offset, view.sizes, view.strides
            )
        tensor = torch._conj(tensor) if view.conjugate else tensor
        return torch._neg_view(tensor) if view.negative else tensor


_SYMBOLS = {"ScalarType": "dtype", "Layout": "layout", "MemoryFormat": "memory_format", "Device": "device"}
"""PyTorch's types that are constants, and what they are called on the wire."""


def _given(op: torch._ops.OpOverload, define: wire.Define) -> list[tuple[Any, wire.Argument]]:
    """Return each argument of the op's schema that is given, with what is given."""
    formals = op._schema.arguments
    given = [*zip(formals, define.arguments, strict=False)]
    return given + [(formal, define.keywords[formal.name]) for formal in formals if formal.name in define.keywords]


def _check_symbols(define: wire.Define, given: Sequence[tuple[Any, wire.Argument]]) -> None:
    """Refuse a number where an op takes a constant: PyTorch would look it up in a table of its own, unchecked."""
    for formal, argument in given:
        kind = _SYMBOLS.get(str(formal.real_type).removeprefix("Optional[").removesuffix("]"))
        if kind and not (argument is None or (isinstance(argument, wire.Symbol) and argument.kind == kind)):
            raise Failure("refused", f"{define.op} takes a {kind} as {formal.name}, not {str(argument)[:100]!r}")
        if formal.name == "pin_memory" and argument:
            raise Failure("refused", f"{define.op} in pinned memory: that is the host's, not the device's")


class Resized:
    """Remembers tensors that an op may resize: one that fails may leave sizes that nothing backs, or that overflow."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._before = [(tensor, tensor.shape, tensor.stride(), tensor.storage_offset()) for tensor in tensors]

    def undo(self) -> None:
        """Give the tensors the sizes that they had before; looks at no other, some of which end the process."""
        for tensor, sizes, strides, offset in self._before:
            tensor.as_strided_(sizes, strides, offset)


class Executor:
    """Runs a session's items in order on `device`; used from one thread."""

    def __init__(self, device: torch.device, memory: Memory) -> None:
        self.device = device
        self.memory = memory
        self.items = 0
        self._tensors: dict[int, torch.Tensor | Failure] = {}
        self._sizes: dict[int, int] = {}
        """The bytes that each tensor is counted with."""
        self._plans: dict[int, Plan | Failure] = {}

    def run(self, batch: wire.Batch, payload: memoryview) -> Iterator[tuple[wire.Message, memoryview]]:
        """Run a batch; yield answers and failures, each with its payload.

        Raises:
            WireError: the client sent what no client sends; the session must end.
        """
        for item in batch.items:
            number = self.items
            self.items += 1
            try:
                answer = self._run(item, payload)
            except WireError:
                raise
            except Exception as error:
                answer = self._failed(item, number, failure_of(error))
            if answer is not None:
                yield answer

    def destination(self, message: wire.Message, length: int) -> memoryview:
        """Return memory for a payload: the tensor's own where it is in reach, so that nothing is copied.

        A payload that no tensor can take costs no memory of its own, however many clients send one at once.

        Raises:
            WireError: it belongs to no write.
        """
        items = message.items if isinstance(message, wire.Batch) else []
        if len(items) != 1 or not isinstance(items[0], wire.Write):
            raise WireError("a payload without the write that it is for, which travels alone")
        tensor = self._tensors.get(items[0].handle)
        start, end = items[0].offset, items[0].offset + length
        if not isinstance(tensor, torch.Tensor) or end > tensor.untyped_storage().nbytes():
            return _waste()[:length]
        if self.device.type == "cpu":
            return bytes_of(tensor).numpy().data[start:end]
        return torch.empty(length, dtype=torch.uint8).numpy().data

    def _failed(self, item: wire.Item, number: int, failure: Failure) -> tuple[wire.Message, memoryview] | None:
        """Have what needs an item fail with it; return what to tell the client, unless it knows."""
        own = failure.item is None
        if own:
            failure.item = number
        self._poison(item, failure.again())
        asked = isinstance(item, (wire.Ask, wire.Read, wire.GetRandomState))
        if not (own or asked):
            return None
        return wire.Failed(failure.item or 0, failure.kind, str(failure)[:16_000], answer=asked), memoryview(b"")

    def close(self) -> None:
        """Drop everything."""
        self._drop(list(self._tensors))
        self._plans.clear()

    def _run(self, item: wire.Item, payload: memoryview) -> tuple[wire.Message, memoryview] | None:
        if isinstance(item, wire.Call):
            self._call(item)
        elif isinstance(item, wire.Free):
            self._drop(item.handles)
        elif isinstance(item, wire.Define):
            self._plans[item.plan] = Plan(item, self.device)
        elif isinstance(item, wire.Put):
            self._put(item)
        elif isinstance(item, wire.Write):
            self._write(item, payload)
        elif isinstance(item, wire.Ask):
            return wire.Results(self._ask(item)), memoryview(b"")
        elif isinstance(item, wire.Read):
            return wire.Data(), self._read(item)
        elif isinstance(item, wire.Synchronize):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return wire.Done(), memoryview(b"")
        elif isinstance(item, wire.Seed):
            torch.manual_seed(int(item.seed.text))
        elif isinstance(item, wire.GetRandomState):
            return wire.Data(), self._generator().get_state().numpy().data
        elif isinstance(item, wire.SetRandomState):
            state = torch.frombuffer(bytearray(item.state), dtype=torch.uint8)
            self._generator().set_state(state)
        elif isinstance(item, wire.GetUsage):
            memory = self.memory
            if item.reset_peak:
                memory.peak_bytes = memory.used_bytes
            return wire.Usage(memory.used_bytes, memory.peak_bytes, memory.limit_bytes, *self._about()), memoryview(b"")
        else:
            raise WireError(f"this session runs no items of the kind {type(item).__name__}")
        return None

    def _about(self) -> tuple[tuple[int, int], int]:
        """Return the CUDA capability and the number of processors of a GPU."""
        if self.device.type != "cuda":
            return (0, 0), 0
        properties = torch.cuda.get_device_properties(self.device)
        return (properties.major, properties.minor), properties.multi_processor_count

    def _start(self, call: wire.Call | wire.Ask) -> tuple[Plan, list[torch.Tensor], list[codec.Number]]:
        plan = self._plans.get(call.plan)
        if plan is None:
            raise WireError(f"a call of plan {call.plan}, which was never defined")
        if isinstance(plan, Failure):
            raise plan.again()
        if len(call.operands) < plan.operands or len(call.numbers) < plan.numbers:
            raise WireError(f"a call of {plan.name} with too few operands")
        operands = [self._tensor(handle) for handle in call.operands]
        numbers = [codec.from_number(number) for number in call.numbers]
        self._require(plan.bytes)
        return plan, operands, numbers

    def _results(
        self, plan: Plan, call: wire.Call | wire.Ask, operands: list[torch.Tensor], numbers: list[codec.Number]
    ) -> list[Any]:
        resized = Resized(operands) if plan.resizes else None
        try:
            return plan.run(operands, numbers)
        except Exception:
            if resized is not None:
                resized.undo()
            raise
        finally:
            if resized is not None:
                self._count_again(call.operands)

    def _call(self, call: wire.Call) -> None:
        plan, operands, numbers = self._start(call)
        results = self._results(plan, call, operands, numbers)
        if len(results) != len(plan.results):
            raise Failure("geometry", f"{len(results)} results where the client believes {len(plan.results)}")
        for place, (result, believed) in enumerate(zip(results, plan.results, strict=True)):
            if believed is not None:
                self._keep(call.first + place, believed.fit(result, operands))

    def _ask(self, ask: wire.Ask) -> list[Any]:
        plan, operands, numbers = self._start(ask)
        answers: list[Any] = []
        for place, result in enumerate(self._results(plan, ask, operands, numbers)):
            if not isinstance(result, torch.Tensor):
                answers.append(codec.number(result) if isinstance(result, (int, float, complex)) else None)
                continue
            if result.layout is not torch.strided:
                raise Failure("not-implemented", f"the result is a {result.layout} tensor, which the pool cannot hold")
            believed = Believed(codec.geometry(result))
            self._require(believed.bytes)
            self._keep(ask.first + place, believed.fit(result, operands))
            answers.append(codec.geometry(result))
        return answers

    def _put(self, put: wire.Put) -> None:
        dtype = codec.dtype(put.dtype)
        if codec.extent(put.sizes, _contiguous(put.sizes)) * dtype.itemsize != len(put.data):
            raise WireError(f"{len(put.data)} bytes for a tensor of {put.dtype} {list(put.sizes)}")
        self._require(len(put.data))
        tensor = torch.frombuffer(bytearray(put.data), dtype=dtype) if put.data else torch.empty(0, dtype=dtype)
        self._keep(put.handle, tensor.view(put.sizes).clone().to(self.device))

    def _write(self, write: wire.Write, payload: memoryview) -> None:
        target = bytes_of(self._tensor(write.handle))
        if write.offset + len(payload) > target.numel():
            raise Failure("refused", f"{len(payload)} bytes at {write.offset} do not fit into {target.numel()}")
        part = target[write.offset : write.offset + len(payload)]
        if len(payload) and (part.device.type != "cpu" or part.data_ptr() != _address(payload)):
            part.copy_(torch.frombuffer(payload, dtype=torch.uint8))

    def _read(self, read: wire.Read) -> memoryview:
        source = bytes_of(self._tensor(read.handle))
        if read.offset + read.length > source.numel():
            raise Failure("refused", f"{read.length} bytes at {read.offset} are not within {source.numel()}")
        part = source[read.offset : read.offset + read.length]
        data = part.cpu().numpy().data
        # The link keeps an answer until the client has it: a few bytes must not keep a large tensor's memory.
        return memoryview(bytes(data)) if len(data) <= COPIED_BYTES else data

    def _require(self, more_bytes: int) -> None:
        """Raise Failure if so many bytes more do not fit into the lease's memory."""
        self.memory.check(more_bytes)

    def _tensor(self, handle: int) -> torch.Tensor:
        tensor = self._tensors.get(handle)
        if tensor is None:
            raise Failure("refused", f"handle {handle} is no tensor of this session")
        if isinstance(tensor, Failure):
            raise tensor.again()
        return tensor

    def _keep(self, handle: int, tensor: torch.Tensor) -> None:
        if handle in self._tensors:
            self._drop([handle])
        if len(self._tensors) >= wire.MAX_TENSORS:
            raise Failure("memory", f"a session may hold {wire.MAX_TENSORS} tensors; free some")
        size = tensor.untyped_storage().nbytes()
        self._require(size)
        self.memory.add(size)
        self._tensors[handle] = tensor
        self._sizes[handle] = size

    def _drop(self, handles: Sequence[int]) -> None:
        for handle in handles:
            self._tensors.pop(handle, None)
        self.memory.add(-sum(self._sizes.pop(handle, 0) for handle in handles))

    def _count_again(self, handles: Sequence[int]) -> None:
        """Count the operands of an op that may have resized them."""
        for handle in handles:
            tensor = self._tensor(handle)
            grown = tensor.untyped_storage().nbytes() - self._sizes[handle]
            self.memory.add(grown)
            self._sizes[handle] += grown
            if grown > 0 and self.memory.used_bytes > self.memory.limit_bytes:
                self._drop([handle])
                self._require(grown)

    def _poison(self, item: wire.Item, failure: Failure) -> None:
        """Have everything that needs this item's results fail with it."""
        if isinstance(item, wire.Define):
            self._plans[item.plan] = failure
        elif isinstance(item, wire.Put):
            self._tensors[item.handle] = failure
        elif isinstance(item, wire.Call):
            plan = self._plans.get(item.plan)
            self._drop(range(item.first, item.first + (len(plan.results) if isinstance(plan, Plan) else 0)))
            for place in range(len(plan.results) if isinstance(plan, Plan) else 1):
                self._tensors[item.first + place] = failure

    def _generator(self) -> torch.Generator:
        if self.device.type == "cuda":
            return torch.cuda.default_generators[self.device.index or 0]
        return torch.default_generator


def failure_of(error: Exception) -> Failure:
    """Return one of PyTorch's exceptions as a failure of a kind that the client can raise again."""
    if isinstance(error, Failure):
        return error
    text = str(error) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return Failure("memory", text)
    if "can't allocate memory" in text or isinstance(error, MemoryError):
        return Failure("memory", f"Pool device out of memory: {text}")
    kinds: dict[type, wire.ErrorKind] = {
        IndexError: "index",
        ValueError: "value",
        TypeError: "type",
        NotImplementedError: "not-implemented",
    }
    return Failure(next((kind for known, kind in kinds.items() if isinstance(error, known)), "runtime"), text)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's whole storage, as bytes."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))


@functools.cache
def _waste() -> memoryview:
    """Return memory for payloads that are received only to be refused; all sessions write there, and none reads."""
    return torch.empty(wire.MAX_PAYLOAD_BYTES, dtype=torch.uint8).numpy().data


def _address(payload: memoryview) -> int:
    return torch.frombuffer(payload, dtype=torch.uint8).data_ptr()


def _contiguous(sizes: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
