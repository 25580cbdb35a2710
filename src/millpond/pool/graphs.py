"""Captured graphs at the worker: defined once of plans that are checked already, then run by one small message.

A graph can only use its inputs and what its earlier steps made, so it has no cycles and reaches no other session. Its
inputs are compared with their declared geometries at each run; what follows from them is checked as single ops are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from millpond.pool import codec, wire
from millpond.pool.errors import WireError
from millpond.pool.executor import Believed, Executor, Failure, Memory, Plan, Resized, failure_of
from millpond.pool.replay import Replayer, tapes_of


class Graph:
    """Steps in order, with the values that each is the last to need."""

    def __init__(self, define: wire.DefineGraph, plans: Mapping[int, Plan | Failure]) -> None:
        self.inputs = [(codec.dtype(g.dtype), torch.Size(g.sizes), g.strides) for g in define.inputs]
        self.outputs = define.outputs
        places = len(self.inputs)
        sizes = [0] * places  # an input is counted where it lives
        self.steps: list[_Step] = []
        for step in define.steps:
            plan = plans.get(step.plan)
            if plan is None:
                raise WireError(f"a graph with plan {step.plan}, which was never defined")
            if isinstance(plan, Failure):
                raise plan.again()
            if any(place >= places for place in step.operands):
                raise WireError("a graph with a step that needs what only a later one makes")
            self.steps.append(_Step(plan, step))
            sizes += [0 if result is None else result.bytes for result in self.steps[-1].results]
            places = len(sizes)
        made = range(len(self.inputs), places)
        if len(set(self.outputs)) != len(self.outputs) or any(place not in made for place in self.outputs):
            raise WireError("a graph may keep each value once that a step made, and nothing else")
        self.written = frozenset(place for step in self.steps for place in step.writes if place < len(self.inputs))
        """The inputs that a step writes to."""
        self.resizes = any(step.plan.resizes for step in self.steps)
        """Whether a step may resize an input."""
        self.peak_bytes = self._plan_drops(sizes)

    def _plan_drops(self, sizes: Sequence[int]) -> int:
        """Tell each step what to drop after it; return the most bytes that live at once, inputs not counted."""
        last = dict.fromkeys(self.outputs, len(self.steps))
        for index, step in reversed(list(enumerate(self.steps))):
            for place in step.operands:
                if last.setdefault(place, index) == index and place not in step.drops:
                    step.drops.append(place)
        live = peak = 0
        place = len(self.inputs)
        for index, step in enumerate(self.steps):
            for _ in step.results:
                live += sizes[place]
                if last.setdefault(place, index) == index:
                    step.drops.append(place)  # nobody asks for it
                place += 1
            peak = max(peak, live)
            live -= sum(sizes[dropped] for dropped in step.drops)
        return peak

    def check(self, inputs: Sequence[torch.Tensor]) -> None:
        """Raise Failure if an input is not what was declared."""
        for place, (tensor, declared) in enumerate(zip(inputs, self.inputs, strict=True)):
            if (tensor.dtype, tensor.shape, tensor.stride()) != declared:
                raise Failure("refused", f"input {place} of a graph is not of the dtype and layout that it declared")

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run the steps, on inputs that were checked, and return what is kept.

        Raises:
            Failure: a step failed.
        """
        values: list[Any] = list(inputs)
        for step in self.steps:
            try:
                step.run(values)
            except Exception as error:
                failure = failure_of(error)
                raise Failure(failure.kind, f"{failure}\n  in {step.plan.name} of a captured graph") from None
            for place in step.drops:
                values[place] = None
        kept: list[torch.Tensor] = [values[place] for place in self.outputs]
        if any(not isinstance(value, torch.Tensor) for value in kept):
            raise Failure("refused", "a graph keeps a value that is no tensor")
        return kept


class _Step:
    """A plan with its numbers, reading operands from and adding results to a run's values."""

    def __init__(self, plan: Plan, step: wire.Step) -> None:
        if len(step.operands) < plan.operands or len(step.numbers) < plan.numbers:
            raise WireError(f"a graph with a step of {plan.name} with too few operands")
        self.plan = plan
        self.operands = step.operands
        self.writes = [step.operands[slot] for slot in plan.writes]
        self.numbers = [codec.from_number(number) for number in step.numbers]
        self.results = plan.results
        if step.results is not None:
            self.results = [None if geometry is None else Believed(geometry) for geometry in step.results]
        self.drops: list[int] = []
        """Places that no later step needs."""

    def run(self, values: list[Any]) -> None:
        operands = [values[place] for place in self.operands]
        results = self.plan.run(operands, self.numbers)
        if len(results) != len(self.results):
            raise Failure("geometry", f"{len(results)} results where the client believes {len(self.results)}")
        for result, believed in zip(results, self.results, strict=True):
            values.append(None if believed is None else believed.fit(result, operands))


class GraphExecutor(Executor):
    """An executor that also runs graphs."""

    def __init__(self, device: torch.device, memory: Memory) -> None:
        super().__init__(device, memory)
        self._graphs: dict[int, Graph | Failure] = {}
        self._tapes = tapes_of(device)
        self._replayers: dict[int, Replayer] = {}
        """Of the graphs that the device can record."""

    def _run(self, item: wire.Item, payload: memoryview) -> tuple[wire.Message, memoryview] | None:
        if isinstance(item, wire.Run):
            self._run_graph(item)
        elif isinstance(item, wire.DefineGraph):
            self._define_graph(item)
        else:
            return super()._run(item, payload)
        return None

    def _run_graph(self, run: wire.Run) -> None:
        graph = self._graphs.get(run.graph)
        if graph is None:
            raise WireError(f"a run of graph {run.graph}, which was never defined")
        if isinstance(graph, Failure):
            raise graph.again()
        if len(run.operands) != len(graph.inputs):
            raise WireError(f"a run of graph {run.graph} with {len(run.operands)} inputs; it has {len(graph.inputs)}")
        inputs = [self._tensor(handle) for handle in run.operands]
        graph.check(inputs)
        replayer = self._replayers.get(run.graph)
        kept = replayer.replay(inputs) if replayer is not None else None
        if kept is None:
            kept = self._run_steps(graph, run, inputs)
            if replayer is not None:
                replayer.note(inputs)
        for place, tensor in enumerate(kept):
            self._keep(run.first + place, tensor)

    def _run_steps(self, graph: Graph, run: wire.Run, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        self._require(graph.peak_bytes)
        self.memory.add(graph.peak_bytes)
        resized = Resized(inputs) if graph.resizes else None
        try:
            return graph.run(inputs)
        except Exception:
            if resized is not None:
                resized.undo()
            raise
        finally:
            self.memory.add(-graph.peak_bytes)
            if resized is not None:
                self._count_again(run.operands)

    def _define_graph(self, define: wire.DefineGraph) -> None:
        self._forget([define.graph])
        self._graphs.pop(define.graph, None)
        graph = self._graphs[define.graph] = Graph(define, self._plans)
        if self._tapes is not None and not graph.resizes:
            self._replayers[define.graph] = Replayer(
                graph.run,
                f"a captured graph of {len(graph.steps)} ops",
                peak_bytes=graph.peak_bytes,
                written=graph.written,
                tapes=self._tapes,
                memory=self.memory,
            )

    def _require(self, more_bytes: int) -> None:
        try:
            super()._require(more_bytes)
        except Failure:
            if not self._forget(list(self._replayers)):
                raise
            super()._require(more_bytes)

    def _forget(self, graphs: Sequence[int]) -> bool:
        """Run these graphs op by op from now on; return whether that gave any memory back."""
        replayers = [self._replayers.pop(graph) for graph in graphs if graph in self._replayers]
        return sum(replayer.forget() for replayer in replayers) > 0

    def _poison(self, item: wire.Item, failure: Failure) -> None:
        if isinstance(item, wire.DefineGraph):
            self._graphs[item.graph] = failure
        elif isinstance(item, wire.Run):
            graph = self._graphs.get(item.graph)
            for place in range(len(graph.outputs) if isinstance(graph, Graph) else 0):
                self._drop([item.first + place])
                self._tensors[item.first + place] = failure
        else:
            super()._poison(item, failure)

    def close(self) -> None:
        """Drop everything."""
        self._forget(list(self._replayers))
        super().close()
        self._graphs.clear()
