"""A host that has joined the pool, as the broker knows it: its workers are run there, by messages."""

from __future__ import annotations

import asyncio
import ipaddress

from millpond.pool import transport, wire
from millpond.pool.host import SILENT_WORKER_S, START_S, OnReport

MARGIN_S = 10.0
"""How much longer than the host itself we wait for a sign of a worker's life."""


class _Running:
    """A worker at the host."""

    def __init__(self, start: wire.StartWorker, on_report: OnReport) -> None:
        self.start = start
        self.on_report = on_report
        self.heard = self.has_reported = False
        """Whether it has reported since this was last looked at, and at all."""
        self.introduce: wire.Introduce | None = None
        """Who it was told that its peers are."""
        self.unwanted = False
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()


class JoinedHost:
    """A host at the other end of a connection, or of the next one: it outlives a break, as leases of clients do."""

    def __init__(self, name: str, session: bytes, writer: asyncio.StreamWriter, now: float) -> None:
        self.name = name
        self.session = session
        """By which it comes back."""
        self._running: dict[int, _Running] = {}
        self._gone = False
        self._attach(writer, now)

    def _attach(self, writer: asyncio.StreamWriter, now: float) -> None:
        self._writer = writer
        self.heard = now
        """When it last gave a sign of life."""
        self._left: float | None = None
        """When its connection closed; None while there is one, or silence."""
        peer, own = (str(writer.get_extra_info(end)[0]) for end in ("peername", "sockname"))
        self.address = "" if ipaddress.ip_address(peer.partition("%")[0]).is_loopback else peer
        self.broker_address = own
        """Where the broker is, seen from there."""

    def come_back(self, writer: asyncio.StreamWriter, now: float) -> None:
        """Go on over a new connection; what the host says of its workers comes over it."""
        self._writer.transport.abort()  # whose end we may not have noticed yet
        self._attach(writer, now)

    def is_served_by(self, writer: asyncio.StreamWriter) -> bool:
        """Return whether this is the connection that the host has now."""
        return self._writer is writer and not self._gone

    def note_break(self, error: Exception, now: float) -> None:
        """Note that the connection broke, and how."""
        self._writer.transport.abort()
        if not transport.is_silence(error):
            self._left = now

    def why_lost(self, now: float, grace_s: float) -> str:
        """Return why the host counts as lost, if it does: as with clients, after silence or a close."""
        closed_s = min(wire.CLOSED_S, grace_s)
        if self._left is not None and now - self._left > closed_s:
            return f"its connection broke, and it has not come back within {closed_s:g} s"
        if now - self.heard > grace_s:
            return f"nothing was heard of it for {now - self.heard:.0f} s"
        return ""

    def was_held_up(self, now: float) -> None:
        """Give the host its time anew: not it was silent, we did not listen."""
        self.heard, self._left = now, None

    def send(self, message: wire.Message) -> None:
        """Send a message, unless there is no connection now: what matters is said again when there is."""
        if not self._writer.is_closing():
            self._writer.write(wire.encode(message))

    async def run_worker(self, start: wire.StartWorker, on_report: OnReport) -> str:
        """Run a worker to its end; return why it ended."""
        if self._gone:
            return f"could not be started: host {self.name} is gone"
        running = self._running[start.worker] = _Running(start, on_report)
        limit_s = START_S + MARGIN_S
        try:
            self.send(start)
            while not (await asyncio.wait([running.ended], timeout=limit_s))[0]:
                if not running.heard and not self._writer.is_closing():
                    self.send(wire.EndWorker(start.worker))
                    return f"was not heard of for {limit_s:g} s, though host {self.name} is well"
                running.heard = False
                limit_s = SILENT_WORKER_S + MARGIN_S
            return running.ended.result()
        finally:
            del self._running[start.worker]

    def introduce(self, introduce: wire.Introduce) -> None:
        """Tell a worker who its peers are."""
        if introduce.worker in self._running:
            self._running[introduce.worker].introduce = introduce
        self.send(introduce)

    def end_worker(self, number: int) -> None:
        """Have a worker end at once."""
        if number in self._running:
            self._running[number].unwanted = True
            self.send(wire.EndWorker(number))

    def take(self, message: wire.Message) -> None:
        """Take in what the host says. Of a worker that is not known (any more) nothing is heeded."""
        if isinstance(message, wire.Heartbeat):
            self.send(message)
        elif isinstance(message, wire.WorkerReport) and message.worker in self._running:
            self._running[message.worker].heard = self._running[message.worker].has_reported = True
            self._running[message.worker].on_report(message)
        elif isinstance(message, wire.Running):
            self._reconcile(set(message.workers))
        elif isinstance(message, wire.WorkerEnded):
            self._resolve(message.worker, message.why)

    def lose(self, why: str) -> None:
        """The host is gone, and its workers with it."""
        self._gone = True
        self._writer.close()
        for number in list(self._running):
            self._resolve(number, f"is lost with its host {self.name}: {why}")

    def _reconcile(self, there: set[int]) -> None:
        """Make what runs there and what should agree, now that it has come back: either end may have missed a word."""
        for number in there - self._running.keys():
            self.send(wire.EndWorker(number))
        for number, running in self._running.items():
            if number in there and running.unwanted:
                self.send(wire.EndWorker(number))
            elif number in there and running.introduce is not None:
                self.send(running.introduce)
            elif number not in there and not (running.has_reported or running.unwanted):
                self.send(running.start)
            elif number not in there:
                self._resolve(number, f"ended while its host {self.name} could not be reached")

    def _resolve(self, number: int, why: str) -> None:
        if number in self._running and not (ended := self._running[number].ended).done():
            ended.set_result(why)
