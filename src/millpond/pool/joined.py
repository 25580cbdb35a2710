"""A host that has joined the pool, as the broker knows it: its workers are run there, by messages."""

from __future__ import annotations

import asyncio
import ipaddress

from millpond.pool import wire
from millpond.pool.host import SILENT_WORKER_S, START_S, OnReport

MARGIN_S = 10.0
"""How much longer than the host itself we wait for a sign of a worker's life."""


class _Running:
    """A worker at the host."""

    def __init__(self, on_report: OnReport) -> None:
        self.on_report = on_report
        self.heard = False
        """Whether it has reported since this was last looked at."""
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()


class JoinedHost:
    """A host at the other end of a connection."""

    def __init__(self, name: str, writer: asyncio.StreamWriter, now: float) -> None:
        self.name = name
        self.heard = now
        """When it last gave a sign of life."""
        self._writer = writer
        self._running: dict[int, _Running] = {}
        peer, own = (str(writer.get_extra_info(end)[0]) for end in ("peername", "sockname"))
        self.address = "" if ipaddress.ip_address(peer.partition("%")[0]).is_loopback else peer
        self.broker_address = own
        """Where the broker is, seen from there."""

    def send(self, message: wire.Message) -> None:
        """Send a message, unless the host is gone."""
        if not self._writer.is_closing():
            self._writer.write(wire.encode(message))

    async def run_worker(self, start: wire.StartWorker, on_report: OnReport) -> str:
        """Run a worker to its end; return why it ended."""
        if self._writer.is_closing():
            return f"could not be started: host {self.name} is gone"
        running = self._running[start.worker] = _Running(on_report)
        limit_s = START_S + MARGIN_S
        try:
            self.send(start)
            while not (await asyncio.wait([running.ended], timeout=limit_s))[0]:
                if not running.heard:
                    self.send(wire.EndWorker(start.worker))
                    return f"was not heard of for {limit_s:g} s, though host {self.name} is well"
                running.heard = False
                limit_s = SILENT_WORKER_S + MARGIN_S
            return running.ended.result()
        finally:
            del self._running[start.worker]

    def introduce(self, introduce: wire.Introduce) -> None:
        """Tell a worker who its peers are."""
        self.send(introduce)

    def end_worker(self, number: int) -> None:
        """Have a worker end at once."""
        if number in self._running:
            self.send(wire.EndWorker(number))

    def take(self, message: wire.Message) -> None:
        """Take in what the host says. Of a worker that is not known (any more) nothing is heeded."""
        if isinstance(message, wire.Heartbeat):
            self.send(message)
        elif isinstance(message, wire.WorkerReport) and message.worker in self._running:
            self._running[message.worker].heard = True
            self._running[message.worker].on_report(message)
        elif isinstance(message, wire.WorkerEnded):
            self._resolve(message.worker, message.why)

    def hang_up(self) -> None:
        """Have the connection end."""
        self._writer.transport.abort()

    def lose(self, why: str) -> None:
        """The host is gone, and its workers with it."""
        self._writer.close()
        for number in list(self._running):
            self._resolve(number, f"is lost with its host {self.name}: {why}")

    def _resolve(self, number: int, why: str) -> None:
        if number in self._running and not (ended := self._running[number].ended).done():
            ended.set_result(why)
