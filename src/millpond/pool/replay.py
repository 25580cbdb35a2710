"""A captured graph's steps as one launch: recorded by the device once, as a CUDA graph, then replayed.

A recording reads and writes the very memory that it was made with. So inputs that stay where they are, such as
parameters, are used in place, and others are copied to where they were. Results appear in the same place each time:
they are lent to the session, and what it still holds of them at the next run is moved out of the way first. Memory
that comes from another recording stays in place too, so the steps between forward, backward and optimizer copy nothing.

Runs go op by op until it is clear which inputs stay, and for ever where the device cannot record what the graph does.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from millpond.pool.executor import Memory, bytes_of

log = logging.getLogger("millpond.pool")

MIN_RUNS = 3
"""Runs before the first recording: what libraries set up at their first use cannot be recorded."""
MAX_RECORDINGS = 8
"""Recordings of one graph, each of which takes fewer of its inputs to stay, before it is run op by op."""

Tensor = torch.Tensor
Run = Callable[[Sequence[Tensor]], list[Tensor]]


class Tape(Protocol):
    """What records the work that is given to a device, without doing it, and then does it as often as wanted."""

    def record(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Record what `run` gives the device to do; return its results, which hold nothing yet."""

    def replay(self) -> None:
        """Do it."""


Tapes = Callable[[], Tape]
"""Makes an empty tape."""


class CudaTape:
    """A CUDA graph, with memory of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()

    def record(self, run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """As `Tape`; other sessions may work meanwhile."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
        ):
            return run()

    def replay(self) -> None:
        """As `Tape`."""
        with torch.cuda.device(self._device):
            self._graph.replay()


def tapes_of(device: torch.device) -> Tapes | None:
    """Return what makes tapes for a device; None if it can record nothing."""
    return (lambda: CudaTape(device)) if device.type == "cuda" else None


class Recording:
    """A graph as the device has recorded it."""

    def __init__(self, tape: Tape, run: Run, inputs: Sequence[Tensor], staying: frozenset[int]) -> None:
        self._tape = tape
        self._fed = {place: _copy(x) for place, x in enumerate(inputs) if place not in staying}
        self._addresses = {place: inputs[place].data_ptr() for place in staying}
        given = [self._fed.get(place, x) for place, x in enumerate(inputs)]
        self._results = tape.record(lambda: run(given))
        self._places = [(x.data_ptr(), x.untyped_storage().nbytes()) for x in self._results]
        self._lent: list[weakref.ref[Tensor]] = []

    def moved(self, inputs: Sequence[Tensor]) -> set[int]:
        """Return the inputs that were to stay, and are elsewhere now."""
        return {place for place, address in self._addresses.items() if inputs[place].data_ptr() != address}

    def is_whole(self) -> bool:
        """Return whether its results' memory is as it was: an op may have resized one that was lent."""
        return self._places == [(x.data_ptr(), x.untyped_storage().nbytes()) for x in self._results]

    def run(self, inputs: Sequence[Tensor], written: frozenset[int]) -> list[Tensor]:
        """Replay it on inputs, some of which it writes to; return its results."""
        for place, x in self._fed.items():
            bytes_of(x).copy_(bytes_of(inputs[place]))
        self._tape.replay()
        for place, x in self._fed.items():
            if place in written:
                bytes_of(inputs[place]).copy_(bytes_of(x))
        results = [_over(x.untyped_storage(), x) for x in self._results]
        self._lent = [weakref.ref(x) for x in results]
        return results

    def settle(self) -> None:
        """Move what the session still holds of the last results to memory of its own."""
        for lent in self._lent:
            if (tensor := lent()) is not None:
                copy = _copy(tensor)
                tensor.set_(copy.untyped_storage(), 0, tensor.shape, tensor.stride())
        self._lent = []


class Replayer:
    """Decides from where a graph's inputs are when it is to be recorded, and keeps the recording."""

    def __init__(
        self, run: Run, name: str, *, peak_bytes: int, written: frozenset[int], tapes: Tapes, memory: Memory
    ) -> None:
        self._run = run
        self._name = name
        self._peak_bytes = peak_bytes
        self._written = written
        self._tapes = tapes
        self._memory = memory
        self._recording: Recording | None = None
        self._reserved_bytes = 0
        self._left = MAX_RECORDINGS
        self._runs = 0
        self._addresses: list[int] = []
        self._staying: frozenset[int] = frozenset()
        self._moving: set[int] = set()
        """Inputs that once seemed to stay, and did not."""

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """Replay the recording on inputs and return its results; None if there is none for them."""
        recording = self._recording
        if recording is None:
            return None
        recording.settle()
        moved = recording.moved(inputs)
        if not moved and recording.is_whole():
            return recording.run(inputs, self._written)
        self._moving |= moved
        self._drop()
        return None

    def note(self, inputs: Sequence[Tensor]) -> None:
        """After a run op by op: record the graph if the same inputs have stayed for two runs, and memory is left."""
        addresses = [x.data_ptr() for x in inputs]
        before, self._addresses = self._addresses, addresses
        self._runs += 1
        if not self._left or not before:
            return
        pairs = enumerate(zip(before, addresses, strict=True))
        staying = frozenset(place for place, (one, other) in pairs if one == other) - self._moving
        as_before, self._staying = staying == self._staying, staying
        if as_before and self._runs >= MIN_RUNS:
            self._record(inputs, staying)

    def forget(self) -> bool:
        """Give back the recording's memory; return whether there was any."""
        had = self._recording is not None
        self._drop()
        return had

    def _record(self, inputs: Sequence[Tensor], staying: frozenset[int]) -> None:
        fed = (x.untyped_storage().nbytes() for place, x in enumerate(inputs) if place not in staying)
        reserved = self._peak_bytes + sum(fed)
        if self._memory.peak_bytes + reserved > self._memory.limit_bytes:
            return
        self._left -= 1
        try:
            self._recording = Recording(self._tapes(), self._run, inputs, staying)
        except Exception as error:
            self._left = 0
            log.warning("%s runs op by op, as the device cannot record it: %s", self._name, error)
            return
        self._reserved_bytes = reserved
        self._memory.add(reserved)

    def _drop(self) -> None:
        if self._recording is not None:
            self._recording.settle()
            self._recording = None
            self._memory.add(-self._reserved_bytes)
            self._reserved_bytes = 0


def _over(storage: torch.UntypedStorage, alike: Tensor) -> Tensor:
    """Return a tensor over a storage that looks like another."""
    tensor = torch.empty(0, dtype=alike.dtype, device=alike.device)
    return tensor.set_(storage, 0, alike.shape, alike.stride())


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy, of what lies between its elements too, in memory of its own."""
    return _over(bytes_of(tensor).clone().untyped_storage(), tensor)
