"""`torch.compile` on the pool: a graph's items are recorded once for each kind of input, then replayed by one message.

Dynamo traces and guards the program, AOTAutograd gives the backward; see docs/decisions/ for why the graph itself is
recorded as the items that it issues. Whatever cannot be recorded runs op by op, with one line in the log that says why.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch

from millpond.pool import codec, lerp, wire
from millpond.pool.plan import SIZED, Plan, convolution_format, tensors_of
from millpond.pool.session import Session
from millpond.pool.tensors import DEVICE, Geometry, Mold, Remote, remote_of

log = logging.getLogger("millpond.pool")

SHOWN = (DEVICE, "cuda")
"""What the pool's tensors say that their device is; no other can say so in this process."""
MAX_RECORDINGS = 32
"""Kinds of input (shapes above all) that one graph is recorded for; a further one runs op by op."""
MAX_DEFINE_BYTES = wire.MAX_HEADER_BYTES // 2
"""Largest definition of a graph; other items share its frame."""

Tensor = torch.Tensor
Key = tuple[Any, ...]


class Unrecordable(Exception):
    """A graph does something that a replay could not repeat."""


class _Recorder:
    """Turns the items that a graph issues into steps over places."""

    def __init__(self, handles: Sequence[int]) -> None:
        self.places = {handle: place for place, handle in enumerate(handles)}
        self.steps: list[wire.Step] = []
        self.refusal = ""
        self._next = len(self.places)

    def issued(self, item: wire.Item, what: Any) -> None:
        """Take a call; anything else but definitions cannot be replayed."""
        if isinstance(item, wire.Call):
            plan: Plan = what
            self._add(item, None, len(plan.molds))
        elif isinstance(item, wire.Ask):
            if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(what.op.overload.tags):
                self._refuse(f"what comes out of {what.op} depends on data")
        elif not isinstance(item, (wire.Define, wire.Free)):
            self._refuse(f"it moves data between the host and the device, or sets random numbers ({what})")

    def answered(self, item: wire.Item, answer: wire.Message, what: Any) -> None:
        """Take what the worker said of an op's results: they depend on shapes alone, so it will say so again."""
        if not isinstance(item, wire.Ask) or not isinstance(answer, wire.Results):
            return
        results = answer.results
        tensors = all(result is None or isinstance(result, wire.Geometry) for result in results)
        if not tensors and what.op.name not in SIZED:
            self._refuse("an op gives the host a number")
            return
        self._add(item, tensors_of(results), len(results))

    def _add(self, item: wire.Call | wire.Ask, results: list[wire.Geometry | None] | None, made: int) -> None:
        try:
            operands = [self.places[handle] for handle in item.operands]
        except KeyError:
            self._refuse("it uses a tensor that it was not given")
            return
        self.steps.append(wire.Step(item.plan, operands, item.numbers, results))
        for place in range(made):
            self.places[item.first + place] = self._next
            self._next += 1

    def _refuse(self, why: str) -> None:
        self.refusal = self.refusal or why


class _Output:
    """How one output is made of a run: an input, the same value each time, or a view of a storage."""

    __slots__ = ("constant", "given", "kept", "view")

    def __init__(self) -> None:
        self.constant: Any = None
        self.given: int | None = None
        """The input that it is, or (with `view`) looks at."""
        self.kept: int | None = None
        """The kept tensor that it is, or (with `view`) looks at."""
        self.view: tuple[torch.Size, tuple[int, ...], int] | None = None


class _Recording:
    """A graph as it is at the worker, and how its outputs are made here."""

    def __init__(self, session: Session, inputs: Sequence[Any], handles: Sequence[int]) -> None:
        self.session = session
        self.number = session.graphs.pop()
        self.written: list[int] = []
        """Inputs that the graph writes to."""
        self.molds: list[Mold] = []
        """Of what is kept."""
        self.outputs: list[_Output] = []
        self.steps = 0
        self._given = {remote.handle: place for place, remote in _remotes(inputs)}
        self._handles = handles

    def finish(self, recorder: _Recorder, inputs: Sequence[Any], outputs: Sequence[Any]) -> wire.DefineGraph:
        """Note the outputs, and return what tells the worker."""
        kept: dict[int, int] = {}
        for value in outputs:
            output = _Output()
            self.outputs.append(output)
            if not isinstance(value, Tensor):
                output.constant = value
                continue
            output.given = next((place for place, given in enumerate(inputs) if given is value), None)
            if output.given is not None:
                continue
            remote = remote_of(value)
            if remote is None or value.dtype != remote.geometry[0] or value.is_neg() or value.is_conj():
                raise Unrecordable("it returns a tensor of the host, or a view as another dtype")
            geometry = _geometry(value)
            if remote.handle in self._given:
                output.given = self._given[remote.handle]
                output.view = geometry[1:]
                continue
            if remote.handle not in recorder.places:
                raise Unrecordable("it returns a tensor that it did not make")
            if remote.handle not in kept:
                kept[remote.handle] = len(kept)
                dtype, sizes, strides, _ = remote.geometry
                self.molds.append(Mold(dtype, sizes, strides, self.session.index))
            output.kept = kept[remote.handle]
            output.view = None if geometry == remote.geometry else geometry[1:]
        known = {remote.handle: remote.geometry for _, remote in _remotes(inputs)}
        declared = [
            wire.Geometry(codec.DTYPE_NAMES[g[0]], tuple(g[1]), g[2]) for g in map(known.get, self._handles) if g
        ]
        places = [recorder.places[handle] for handle in kept]
        self.steps = len(recorder.steps)
        return wire.DefineGraph(self.number, declared, recorder.steps, places)

    def replay(self, inputs: Sequence[Any], handles: list[int]) -> list[Any]:
        """Run the graph at the worker, without waiting."""
        session = self.session
        with session.lock:
            if session.failure is not None:
                session.raise_failure()
            first = session.new_handles(len(self.molds))
            if self.steps:
                session.issue(wire.Run(self.number, handles, first), self)
                session.flush()  # it is much work, and so worth a frame
            kept = [mold.cast(session, first + place) for place, mold in enumerate(self.molds)]
        if self.written:
            torch.autograd.graph.increment_version([inputs[place] for place in self.written])
        results = []
        for output in self.outputs:
            if output.kept is not None:
                value = kept[output.kept]
            elif output.given is not None:
                value = inputs[output.given]
            else:
                value = output.constant
            results.append(value if output.view is None else value.detach().as_strided(*output.view))
        return results

    def __str__(self) -> str:
        return f"a captured graph of {self.steps} ops"

    def __del__(self) -> None:
        self.session.graphs.append(self.number)  # the worker drops the graph for the next of this number


class _AsTraced(torch.fx.Interpreter):
    """Runs a graph op by op, with each result in the memory layout that it was traced in.

    What was traced counts on it: a `contiguous` that changed nothing was left out, and some of PyTorch's kernels read
    their operands in each other's layout.
    """

    def run_node(self, node: torch.fx.Node) -> Any:
        """Run a node, and lay its result out."""
        result = super().run_node(node)
        traced = node.meta.get("val")
        if not isinstance(result, Tensor) or not isinstance(traced, Tensor) or result.shape != traced.shape:
            return result
        pairs = zip(result.shape, result.stride(), traced.stride(), strict=True)
        if all(size < 2 or step == other or type(other) is not int for size, step, other in pairs):
            return result
        return torch.empty_strided(result.shape, traced.stride(), dtype=result.dtype, device=result.device).copy_(
            result
        )


class Captured:
    """A graph of Dynamo's or AOTAutograd's that is recorded for each kind of input, and replayed."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self._run = _AsTraced(module).run
        self._resident = [
            attrgetter(name)(module) for name in dict.fromkeys(n.target for n in module.graph.find_nodes(op="get_attr"))
        ]
        """Parameters, optimizers' states and constants that the graph holds itself: inputs as well."""
        self._recordings: dict[Key, _Recording | None] = {}
        self._full = False

    def __call__(self, *given: Any) -> Any:
        """Run the graph."""
        inputs = (*given, *self._resident)
        session, key, handles = _signature(inputs)
        if session is None:
            return self._run(*given)
        recording = self._recordings.get(key)
        if recording is not None:
            return recording.replay(inputs, handles)
        if key in self._recordings:
            return self._run(*given)
        return self._record(session, key, given, handles)

    def _record(self, session: Session, key: Key, given: Sequence[Any], handles: list[int]) -> Any:
        """Run op by op, and keep what was issued for the next time."""
        inputs = (*given, *self._resident)
        with session.lock:
            if len(self._recordings) >= MAX_RECORDINGS or not session.graphs:
                if not self._full:
                    log.warning("a part of the program has had %d kinds of input; others run op by op", MAX_RECORDINGS)
                self._full = True
                return self._run(*given)
            recorder = session.recorder = _Recorder(handles)
            versions = [value._version if isinstance(value, Tensor) else 0 for value in inputs]
            try:
                outputs = self._run(*given)
            finally:
                session.recorder = None
            self._recordings[key] = None
            try:
                if recorder.refusal:
                    raise Unrecordable(recorder.refusal)
                if _signature(inputs)[1] != key:
                    raise Unrecordable("it gives an input another shape or storage")
                recording = _Recording(session, inputs, handles)
                define = recording.finish(recorder, inputs, outputs)
                if (
                    len(define.steps) > wire.MAX_GRAPH_STEPS
                    or len(wire.encode(wire.Batch([define]))) > MAX_DEFINE_BYTES
                ):
                    raise Unrecordable("it is too large for one message")
            except Unrecordable as reason:
                log.warning("a part of the program runs op by op on the pool, not captured: %s", reason)
                return outputs
            recording.written = [
                place
                for place, (value, version) in enumerate(zip(inputs, versions, strict=True))
                if isinstance(value, Tensor) and value._version != version
            ]
            if define.steps:
                session.issue(define, recording)
            self._recordings[key] = recording
        return outputs


def _signature(inputs: Sequence[Any]) -> tuple[Session | None, Key, list[int]]:
    """Return the one session of the inputs, what kind they are, and their distinct handles in order."""
    key: list[Any] = []
    places: dict[int, int] = {}
    session: Session | None = None
    for value in inputs:
        if not isinstance(value, Tensor):
            key.append(value)
            continue
        remote = remote_of(value)
        if remote is None or (session is not None and remote.session is not session):
            return None, (), []
        session = remote.session
        geometry = _geometry(value)
        key.append(geometry)
        if geometry != remote.geometry or value.dtype.is_complex or remote.negated:
            key.append((remote.geometry, value.is_neg(), value.is_conj()))
        key.append(places.setdefault(remote.handle, len(places)))
    return session, tuple(key), list(places)


def _geometry(value: Tensor) -> Geometry:
    return value.dtype, value.shape, value.stride(), int(value.storage_offset())


def _remotes(inputs: Sequence[Any]) -> list[tuple[int, Remote]]:
    found = [(place, remote_of(value)) for place, value in enumerate(inputs) if isinstance(value, Tensor)]
    return [(place, remote) for place, remote in found if remote is not None]


# --- between Dynamo and recordings ---------------------------------------------------------------------------------


def compile_graph(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph of Dynamo's: the backend of `torch.compile` for the pool device."""
    try:
        with _real_devices():
            return _compile(module, inputs)
    except torch._dynamo.exc.RestartAnalysis:
        raise
    except Exception as error:  # of any kind: an op without a meta kernel, say, has PyTorch's tracer fail as it may
        reason = " ".join(str(error).split("\n")[:1]) or type(error).__name__
        log.warning("a part of the program runs op by op on the pool, not captured: %s", reason)
    return module.forward


@contextlib.contextmanager
def _real_devices() -> Iterator[None]:
    """Let PyTorch's compiler see tensors on the pool also where the program calls it `cuda`."""
    shown = {name: vars(Tensor)[name] for name in ("device", "is_cuda") if name in vars(Tensor)}
    for name in shown:
        delattr(Tensor, name)
    try:
        yield
    finally:
        for name, getter in shown.items():
            setattr(Tensor, name, getter)


def _compile(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    host = {node for node in module.graph.nodes if _touches_host(node)}
    if not host:
        return _capture(module, inputs)
    for node in host:
        if node.op != "output" and any(_is_on(argument, SHOWN) for argument in node.all_input_nodes):
            name = getattr(node.target, "__name__", node.target)
            raise Unrecordable(f"{name} takes tensors of the host and of the device")
    from torch.fx.passes.split_module import split_module

    split = split_module(module, None, lambda node: int(node not in host))  # type: ignore[arg-type]
    device_part: Any = split.get_submodule("submod_1")
    (output,) = device_part.graph.find_nodes(op="output")
    single = isinstance(output.args[0], torch.fx.Node)
    if single:  # as Dynamo's own graphs, it must return several
        output.args = ((output.args[0],),)
        device_part.recompile()
    known = {node.name: node.meta.get("example_value") for node in module.graph.nodes}  # the parts keep names only
    captured = _capture(device_part, [known[node.name] for node in device_part.graph.find_nodes(op="placeholder")])
    split.submod_1 = _Call((lambda *inputs: captured(*inputs)[0]) if single else captured)
    return split.forward


class _Call(torch.nn.Module):
    """A compiled function where a module has to stand."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


def _capture(module: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    (output,) = module.graph.find_nodes(op="output")
    if not any(getattr(node.meta.get("example_value"), "requires_grad", False) for node in output.all_input_nodes):
        lerp.fuse(module)
        return Captured(module)  # autograd has no part in it, so it may write in place
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func

    compiler = lambda graph, _: make_boxed_func(Captured(graph))  # noqa: E731
    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)(module, examples)


def _touches_host(node: torch.fx.Node) -> bool:
    """Return whether a node makes or takes a tensor of the host."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    return any(_is_on(value, ("cpu",)) for value in (node, *node.all_input_nodes))


def _is_on(node: torch.fx.Node, devices: tuple[str, ...]) -> bool:
    values = node.meta.get("example_value")
    several = values if isinstance(values, (list, tuple)) else (values,)
    return any(isinstance(value, Tensor) and value.device.type in devices for value in several)


def install() -> None:
    """Make this the backend of `torch.compile` wherever a graph has tensors of the pool. Imports nothing yet."""
    wrapper = torch._TorchCompileInductorWrapper
    inductor: Callable[..., Any] = wrapper.__call__
    start: Callable[..., None] = wrapper.__init__

    @functools.wraps(start)
    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        _prepare_dynamo()

    @functools.wraps(inductor)
    def call(self: Any, module: Any, inputs: Any, **options: Any) -> Any:
        attributes = [*module.parameters(), *module.buffers()]
        on_pool = any(isinstance(value, Tensor) and value.device.type in SHOWN for value in (*inputs, *attributes))
        if on_pool or any(_is_on(node, SHOWN) for node in module.graph.nodes):
            return compile_graph(module, inputs)
        return inductor(self, module, inputs, **options)

    wrapper.__init__, wrapper.__call__ = begin, call  # type: ignore[method-assign,assignment]


@functools.cache
def _prepare_dynamo() -> None:
    """Tell Dynamo what it knows of CUDA only."""
    from torch._dynamo import trace_rules
    from torch._dynamo.variables import optimizer
    from torch._subclasses.fake_tensor import FakeTensor

    trace_rules.add(__package__)  # kernels run beneath what is traced
    set_capturable: Callable[..., None] = optimizer.OptimizerVariable._set_capturable
    normalize = FakeTensor._normalize_fake_device
    is_static = optimizer._is_static_for_cudagraphs

    @functools.wraps(set_capturable)
    def set_capturable_on_pool(self: Any, tx: Any) -> None:
        for group in self.value.param_groups:
            if "capturable" in group and all(parameter.device.type in SHOWN for parameter in group["params"]):
                group["capturable"] = True
        set_capturable(self, tx)

    optimizer.OptimizerVariable._set_capturable = set_capturable_on_pool  # type: ignore[method-assign]
    optimizer._is_static_for_cudagraphs = lambda x: x.device.type not in SHOWN and is_static(x)
    format_of = torch._C._conv_determine_backend_memory_format
    torch._C._conv_determine_backend_memory_format = (
        lambda input, weight, backend: (  # what is traced looks as what runs
            convolution_format(input, weight) if input.device.type in SHOWN else format_of(input, weight, backend)
        )
    )
    # A fake tensor on a real `cuda` would end the process in a PyTorch that was built without CUDA.
    FakeTensor._normalize_fake_device = staticmethod(  # type: ignore[method-assign]
        lambda device: normalize(torch.device(DEVICE, device.index) if device.type == "cuda" else device)
    )
