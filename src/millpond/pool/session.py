"""A program's end of a session with a worker: items stream out in batches, answers are waited for only when asked.

Errors arrive late, typed, and are raised where the program is then; they name the op, its operands and the line of
the program that issued it. A broken connection is only a pause; a lost one stays lost, and says what was lost with it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, Protocol, TypeVar

import torch

from millpond import MillpondError
from millpond.pool import tensors, wire
from millpond.pool.errors import ConnectionLost, OpError, OpRefused, WireError
from millpond.pool.interrupts import hold_back_interrupts
from millpond.pool.link import COPIED_BYTES, Link

FLUSH_ITEMS = 128
"""Items that are sent together at most, unless they are being waited for."""
FLUSH_S = 0.001
"""How long items may wait for company, so that the worker never starves."""
IDLE_ROUNDS = 50
"""The flushing thread sleeps after so many rounds with nothing to send."""
LOOK_S = 1.0
"""How often a session that issues nothing looks whether its connection stands."""
WAIT_S = 0.5
"""How long to wait for an answer before looking whether there is anything else to do, again and again."""
REMEMBERED_SITES = 1 << 16
"""Issued items of which the line is remembered; an error about an older one cannot name its line."""

Answer = TypeVar("Answer", bound=wire.Message)
Site = tuple[CodeType, int]
_NOWHERE = memoryview(b"")


class Recorder(Protocol):
    """Watches what a session issues, while a graph is captured."""

    def issued(self, item: wire.Item, what: Any) -> None:
        """See an item."""

    def answered(self, item: wire.Item, answer: wire.Message, what: Any) -> None:
        """See the answer to an item."""


class LeaseOutOfMemory(MillpondError, torch.OutOfMemoryError):
    """The lease's memory is used up; also a `torch.OutOfMemoryError`. Free something, and go on."""


class Session:
    """A program's session with a worker. Thread-safe; `lock` is held while items are issued."""

    def __init__(self, link: Link, *, index: int, lease: str, worker: str, memory_bytes: int, on_gpu: bool) -> None:
        self.link = link
        self.index = index
        self.lease = lease
        self.worker = worker
        self.memory_bytes = memory_bytes
        self.on_gpu = on_gpu
        self.lock = threading.RLock()
        self.watched: dict[int, tensors.Freed] = {}
        """A watch on every handle that something looks at."""
        self.frees: deque[tensors.Freed] = deque()
        """The watches of handles that nothing looks at any more; sent with the next batch."""
        self.large_frees: deque[tensors.Freed] = deque()
        """Likewise of large tensors; sent before the next op, which may need their memory."""
        self.plans: dict[Any, Any] = {}
        self.handle = 1
        """The next handle to give."""
        self.address = tensors.first_address(index)
        """The next address to give."""
        self.failure: Exception | None = None
        """What went wrong and has not been raised yet; or, once lost, for ever."""
        self.lost: ConnectionLost | None = None
        self.graphs = list(range(wire.MAX_GRAPHS))
        """Numbers of graphs that can be given."""
        self.blocking = os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
        """Whether each op is waited for, as on a GPU, so that an error comes from the very line; slow."""
        self.recorder: Recorder | None = None
        """Set and reset by who holds `lock`."""
        self._items: list[wire.Item] = []
        self._sent = 0
        self._owed = 0
        self._sites: list[tuple[int, Any, Site | None, int] | None] = [None] * REMEMBERED_SITES
        """By item: its number, what it is, the line that issued it, and autograd's number of it or of its forward."""
        self._awake = threading.Event()
        threading.Thread(target=self._flush_by_time, name="pool-flush", daemon=True).start()
        os.register_at_fork(after_in_child=self._forked)

    def issue(self, item: wire.Item, what: Any = "") -> None:
        """Send an item soon. `what` describes it in an error (its `str`). The caller holds `lock`."""
        if self.large_frees and not isinstance(item, wire.Write):  # which travels alone
            self._free()
        self._append(item, what)
        if self.blocking and self.recorder is None and isinstance(item, wire.Call | wire.Run):
            self.request(wire.Synchronize(), wire.Done)
        elif len(self._items) >= FLUSH_ITEMS:
            self.flush()
            self.raise_failure()
        elif len(self._items) == 1 and not self._awake.is_set():
            self._awake.set()

    def flush(self, payload: memoryview | bytes = b"") -> None:
        """Send what has been issued, and note failures that have come in."""
        with self.lock, hold_back_interrupts():
            if not payload:  # a payload's frame holds nothing else
                self._free()
            if not self._items or self.lost:
                return
            try:
                batch, self._items = wire.Batch(self._items), []
                self._sent += len(batch.items)
                self.link.send(batch, memoryview(payload))
                self._take_in()
            except (ConnectionLost, WireError) as error:
                self._lose(error)
            except BaseException:
                self._lose(WireError("interrupted within a message"))
                raise

    def _take_in(self) -> None:
        while self._owed == 0 and self.link.has_input():
            if taken := self.link.take():
                self._take(taken[0])

    def _look(self) -> None:
        """Take in what has come, and mend a connection that broke.

        The program may wait for another device, whose worker waits for what this one is to send it.
        """
        with self.lock, hold_back_interrupts():
            try:
                if self.lost is None:
                    self._take_in()
            except (ConnectionLost, WireError) as error:
                self._lose(error)

    def request(self, item: wire.Item, answer: type[Answer], what: Any = "") -> tuple[Answer, memoryview]:
        """Issue an item, and wait for its answer and payload.

        Raises:
            OpError, torch.OutOfMemoryError, IndexError, …: the item failed, or one before it did.
            ConnectionLost: the worker is gone.
        """
        return self.requests([item], answer, what)[0]

    def requests(
        self, items: list[wire.Item], answer: type[Answer], what: Any = "", into: memoryview = _NOWHERE
    ) -> list[tuple[Answer, memoryview]]:
        """Issue several items at once, and wait for all their answers, in order; payloads land in `into` if given."""
        with self.lock:
            with hold_back_interrupts():
                stale, self._owed = self._owed, self._owed + len(items)
                self._free()
                for item in items:
                    self._append(item, what)
                self.flush()
            answers: list[tuple[Answer, memoryview]] = []
            while self._owed and not self.lost:
                if not self.link.has_input(WAIT_S):
                    continue  # a Ctrl-C while nothing comes is raised here; the answer is then owed to no one
                with hold_back_interrupts():
                    taken = self._receive(into)
                    if taken is None:
                        continue
                    message, payload = taken
                    if isinstance(message, wire.Failed) and not message.answer:
                        self._take(message)
                        continue
                    self._owed -= 1
                    if stale:
                        stale -= 1  # the answer to a request that was interrupted
                    elif isinstance(message, answer):
                        answers.append((message, payload))
                        into = into[len(payload) :]
                    else:
                        self._take(message)
            self.raise_failure()
            if len(answers) != len(items):
                self._lose(WireError("the worker answered something else than it was asked"))
                self.raise_failure()
            if self.recorder is not None:
                for item, (message, _) in zip(items, answers, strict=True):
                    self.recorder.answered(item, message, what)
            return answers

    def write(self, handle: int, data: memoryview, what: Any) -> None:
        """Send bytes into a tensor's storage; they may change after."""
        with self.lock:
            self.flush()
            if len(data) <= COPIED_BYTES:
                data = memoryview(bytes(data))
            for start in range(0, len(data), wire.MAX_PAYLOAD_BYTES):
                self.issue(wire.Write(handle, start), what)
                self.flush(data[start : start + wire.MAX_PAYLOAD_BYTES])
            if len(data) > COPIED_BYTES:
                self._settle()
            self.raise_failure()

    def seed(self, seed: int) -> None:
        """Seed the worker's generator."""
        with self.lock:
            self.issue(wire.Seed(wire.BigInt(str(seed % 2**64))), "manual_seed")

    def random_state(self) -> torch.Tensor:
        """Return the state of the worker's generator."""
        _, state = self.request(wire.GetRandomState(), wire.Data, "get_rng_state")
        return torch.frombuffer(bytearray(state), dtype=torch.uint8)

    def set_random_state(self, state: torch.Tensor) -> None:
        """Set the state of the worker's generator."""
        with self.lock:
            self.issue(wire.SetRandomState(state.cpu().numpy().tobytes()), "set_rng_state")

    def new_handles(self, count: int) -> int:
        """Return the first of `count` handles. The caller holds `lock`."""
        first = self.handle
        self.handle = first + count
        return first

    def raise_failure(self) -> None:
        """Raise what went wrong since the last time."""
        if self.failure is not None:
            failure, self.failure = self.failure, self.lost
            raise failure

    def close(self) -> None:
        """End the session; what it had on the worker is freed there."""
        with self.lock:
            if self.lost is None:
                self.flush()
                with contextlib.suppress(ConnectionLost, WireError):
                    self.link.connection.send(wire.EndSession())
                self.lost = ConnectionLost("the session with the pool has ended")
                self.failure = self.lost
                self.link.close()
            self._awake.set()

    def _free(self) -> None:
        """Issue what nothing looks at any more as free."""
        for frees in (self.large_frees, self.frees):
            while frees:
                handles = [frees.popleft().handle for _ in range(min(len(frees), wire.MAX_ITEMS))]
                for handle in handles:
                    self.watched.pop(handle, None)
                self._items.append(wire.Free(handles))

    def _append(self, item: wire.Item, what: Any) -> None:
        if self.recorder is not None:
            self.recorder.issued(item, what)
        number = self._sent + len(self._items)
        self._items.append(item)
        issuer = site()
        sequence = _sequence() if issuer is not None else _sequence_of_forward()
        self._sites[number & (REMEMBERED_SITES - 1)] = (number, what, issuer, sequence)

    def _settle(self) -> None:
        """Wait until the worker has all that was sent."""
        with hold_back_interrupts():
            try:
                if self.lost is None:
                    self.link.settle()
            except (ConnectionLost, WireError) as error:
                self._lose(error)
            except BaseException:
                self._lose(WireError("interrupted within an upload"))
                raise

    def _receive(self, into: memoryview) -> tuple[wire.Message, memoryview] | None:
        def place(message: wire.Message, length: int) -> memoryview:
            return into[:length] if len(into) >= length else memoryview(bytearray(length))

        try:
            return self.link.take(place)
        except (ConnectionLost, WireError) as error:
            self._lose(error)
            raise self.lost from None  # type: ignore[misc]
        except BaseException:
            self._lose(WireError("interrupted within an answer"))
            raise

    def _take(self, message: wire.Message) -> None:
        """Note a failure that the worker reports."""
        if isinstance(message, wire.Refused):
            self._lose(WireError(f"the worker ended the session: {message.message}"))
        elif not isinstance(message, wire.Failed):
            self._lose(WireError("the worker sent something that nobody asked for"))
        elif self.failure is None:
            self.failure = self._error_of(message)

    def _error_of(self, failed: wire.Failed) -> Exception:
        known = self._sites[failed.item & (REMEMBERED_SITES - 1)]
        text = failed.message
        if known is not None and known[0] == failed.item:
            _, what, issuer, sequence = known
            where = f"issued at {_line(issuer)}" if issuer else self._backward_of(sequence)
            text = f"{text}\n  in {what}\n  {where}" if what else f"{text}\n  {where}"
        kinds: dict[str, Callable[[str], Exception]] = {
            "memory": LeaseOutOfMemory,
            "refused": OpRefused,
            "index": IndexError,
            "value": ValueError,
            "type": TypeError,
            "not-implemented": NotImplementedError,
        }
        return kinds.get(failed.kind, OpError)(text)

    def _backward_of(self, sequence: int) -> str:
        """Return which line's backward it was, if that is remembered."""
        forward = [known for known in self._sites if known and known[3] == sequence and known[2]]
        if not forward:
            return "issued at the backward pass"
        _, what, issuer, _ = min(forward, key=lambda known: known[0])
        return f"in the backward of {what}\n  issued at {_line(issuer)}"

    def _lose(self, error: Exception) -> None:
        if self.lost is None:
            self.lost = ConnectionLost(
                f"lost the pool device pool:{self.index} (lease {self.lease}, worker {self.worker}): {error}. "
                "All tensors on the device are gone. "
                "Check the pool with: millpond pool status; then start the program again, from its last checkpoint."
            )
        self.failure = self.lost
        self._items.clear()
        self.watched.clear()
        self.frees.clear()
        self.large_frees.clear()
        self.link.close()

    def _flush_by_time(self) -> None:
        quiet = 0
        while self.lost is None:
            if not self._awake.wait(LOOK_S):
                self._look()
                continue
            time.sleep(FLUSH_S)
            if self._items:
                quiet = 0
                self.flush()
            elif (quiet := quiet + 1) >= IDLE_ROUNDS:
                quiet = 0
                self._awake.clear()
                if self._items:
                    self._awake.set()

    def _forked(self) -> None:
        """Keep a forked child off the connection: it is its parent's."""
        self.lock = threading.RLock()
        self.lost = ConnectionLost(
            "the pool device cannot be used in a process that was forked after the device was used. "
            "Start it with the 'spawn' method: multiprocessing.get_context('spawn')."
        )
        self.failure = self.lost


_sequence: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]
"""Returns the number that autograd gives to this thread's next op; the one that runs now has the number before."""


def _sequence_of_forward() -> int:
    """Return what `_sequence` was when the op ran forward whose backward runs now."""
    node = torch._C._current_autograd_node()
    return -1 if node is None else node._sequence_nr() + 1


def _line(site: Site | None) -> str:
    return f"{site[0].co_filename}:{site[1]}, in {site[0].co_name}" if site else "a line that is not known"


_OURS = (os.path.dirname(os.path.abspath(__file__)) + os.sep, os.path.dirname(torch.__file__) + os.sep)  # noqa: PTH120, PTH100
_is_library: dict[str, bool] = {}
"""By file: a code object as a key would be hashed whole each time."""


def site() -> Site | None:
    """Return the line of the user's program that runs now; None in autograd's own thread."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        code = frame.f_code
        library = _is_library.get(code.co_filename)
        if library is None:
            library = _is_library[code.co_filename] = code.co_filename.startswith((*_OURS, "<frozen"))
        if not library:
            return code, frame.f_lineno
        frame = frame.f_back
    return None
