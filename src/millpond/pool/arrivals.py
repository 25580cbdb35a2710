"""What comes from the other workers of a lease: taken into its memory under tickets, and waited for by `receive`.

Whatever comes is taken in at once. What does not fit, or is given up, is received into nothing, and whoever comes for
it is told why. It knows no sockets: a sender is whatever object stands for one.
"""

from __future__ import annotations

import threading
import time

import torch

from millpond.pool import wire
from millpond.pool.errors import WireError
from millpond.pool.executor import Failure, Memory, failure_of

MAX_ARRIVALS = 4096
"""Deliveries that wait for their `receive`."""
RECEIVE_S = 300.0
"""How long a `receive` waits: the sender may have much to compute before it gets to its `send`."""
KEEP_S = 600.0
"""How long a delivery waits for its `receive`."""


class _Arrival:
    """A delivery: bytes that came, or are coming, under a ticket."""

    def __init__(self, total: int, sender: object) -> None:
        self.total = total
        self.sender = sender
        self.received = 0
        self.data: torch.Tensor | None = None
        self.failure: Failure | None = None
        self.expires = time.monotonic() + KEEP_S

    @property
    def is_over(self) -> bool:
        return self.failure is not None or (self.data is not None and self.received == self.total)


class Arrivals:
    """A worker's deliveries that have come, or are coming. For any thread."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._known: dict[bytes, _Arrival] = {}
        self._changed = threading.Condition()
        self._away: dict[int, str] = {}
        """By device: why nothing comes from its worker any more."""

    def place(self, message: wire.Deliver, length: int, sender: object) -> torch.Tensor | None:
        """Return the memory of a delivery that goes on as it should; None for one that was refused or given up.

        Raises:
            WireError: the part is not the next one of its delivery.
        """
        with self._changed:
            new = message.ticket not in self._known
            if new and message.offset > 0:
                return None
            arrival = self._arrival(message.ticket, message.total, sender)
            if arrival.failure is not None:
                return None
            if arrival.sender is not sender or arrival.total != message.total:
                raise WireError("two deliveries under one ticket")
            if message.offset != arrival.received or message.offset + length > arrival.total:
                raise WireError(f"{length} bytes at {message.offset} of {arrival.total}; {arrival.received} have come")
            if new:
                try:
                    self._memory.check(arrival.total)
                    arrival.data = torch.empty(arrival.total, dtype=torch.uint8)
                    self._memory.add(arrival.total)
                except (Failure, RuntimeError, MemoryError) as error:
                    arrival.failure = failure_of(error).again()
            return arrival.data

    def add(self, message: wire.Deliver, length: int, sender: object) -> None:
        """Note that a part has come, into the memory that it was given.

        Raises:
            WireError: as `place`.
        """
        with self._changed:
            if self.place(message, length, sender) is not None:
                self._known[message.ticket].received += length
            self._changed.notify_all()

    def withhold(self, message: wire.Withhold, sender: object) -> None:
        """Note that a delivery, unless it is here, does not come, and why."""
        with self._changed:
            arrival = self._arrival(message.ticket, 0, sender)
            if not arrival.is_over:
                self._fail(arrival, Failure(message.kind, message.message))
            self._changed.notify_all()

    def break_off(self, sender: object) -> None:
        """Give up what a sender that is lost has begun."""
        with self._changed:
            for arrival in self._known.values():
                if arrival.sender is sender and not arrival.is_over:
                    self._fail(arrival, Failure("runtime", "the connection broke on the way from the other device"))
            self._changed.notify_all()

    def lose(self, device: int, why: str) -> None:
        """Have no `receive` wait any more for what the worker of a device has not delivered."""
        with self._changed:
            self._away[device] = why
            self._changed.notify_all()

    def find(self, device: int) -> None:
        """Wait for what the worker of a device delivers: it is here (again)."""
        with self._changed:
            self._away.pop(device, None)

    def claim(self, device: int, ticket: bytes, way: str) -> torch.Tensor:
        """Return the bytes that come under a ticket from a device, once they are here; they count no more as memory.

        `way` says in an error where from and where to.

        Raises:
            Failure: they do not come.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_over(ticket) or device in self._away, RECEIVE_S)
            if not self._is_over(ticket):
                self._forgo(ticket)
                if (why := self._away.get(device)) is not None:
                    raise Failure("runtime", f"nothing comes any more {way}: {why}")
                raise Failure("runtime", f"nothing has come {way} for {RECEIVE_S:g} s")
            arrival = self._known.pop(ticket)
            if arrival.failure is not None:
                failure = arrival.failure
                raise Failure(failure.kind, f"{failure}\n  on the way from device {device} of this lease")
            data = arrival.data
            assert data is not None
            self._drop(arrival)
            return data

    def expire(self) -> None:
        """Drop deliveries that nobody has come for."""
        now = time.monotonic()
        with self._changed:
            for ticket in [ticket for ticket, arrival in self._known.items() if arrival.expires < now]:
                self._drop(self._known.pop(ticket))

    def _is_over(self, ticket: bytes) -> bool:
        return ticket in self._known and self._known[ticket].is_over

    def _forgo(self, ticket: bytes) -> None:
        """Take nothing in under a ticket any more: nobody will come for it."""
        if ticket in self._known or len(self._known) < MAX_ARRIVALS:
            self._fail(self._arrival(ticket, 0, None), Failure("runtime", "it came too late"))

    def _arrival(self, ticket: bytes, total: int, sender: object) -> _Arrival:
        if ticket not in self._known:
            if len(self._known) >= MAX_ARRIVALS:  # what failed goes first: it waits only to say why
                self._known = {known: arrival for known, arrival in self._known.items() if not arrival.failure}
            if len(self._known) >= MAX_ARRIVALS:
                raise WireError(f"{MAX_ARRIVALS} deliveries wait already")
            self._known[ticket] = _Arrival(total, sender)
        return self._known[ticket]

    def _fail(self, arrival: _Arrival, failure: Failure) -> None:
        self._drop(arrival)
        arrival.failure = failure

    def _drop(self, arrival: _Arrival) -> None:
        if arrival.data is not None:
            arrival.data = None
            self._memory.add(-arrival.total)
