"""Copies between the workers of one lease: the bytes go from the one to the other, and never through the client.

The broker alone tells a worker who its peers are, and gives them a token of their own. A copy is a `send` at the one
and a `receive` at the other, which the client joins by a ticket that nobody can guess. A worker always takes in what
comes, so that two that send to each other never wait for each other. What they send goes over links, as a session
does: a connection that breaks is made anew, and nothing is lost.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from millpond.pool import tls, transport, wire
from millpond.pool.arrivals import MAX_ARRIVALS, Arrivals
from millpond.pool.errors import ConnectionLost, HandshakeError, PoolError, WireError
from millpond.pool.executor import Believed, Failure, Memory, bytes_of, failure_of
from millpond.pool.graphs import GraphExecutor
from millpond.pool.link import COPIED_BYTES, Berth, Dialler, Link
from millpond.pool.worker import Introduction

CHUNK_BYTES = 4 * 1024 * 1024
"""Bytes that travel in one frame, and that a delivery which is refused is read into."""
SEND_S = 30.0
"""How long a peer may take nothing in before its connection counts as broken."""
LOOK_S = 0.25
"""How often a way to a peer on which nothing is sent is looked at."""
INTRODUCE_S = 10.0
"""How long the broker's word on the peers may take, once a client has been told of the lease."""
MAX_CALLERS = 1024
"""Connections to a worker's peers' port; a further one is hung up on."""


class Way:
    """What we deliver to one peer: over a link, or, where that was lost, over a new one. For any thread."""

    def __init__(self, dial: Callable[[float], transport.Connection], own: int, grace_s: float) -> None:
        self._dial = dial
        self._own = own
        self._grace_s = grace_s
        self._link: Link | None = None
        self._lost: tuple[float, str] | None = None
        """When the last link was lost, and why, while there is no other."""
        self._owed: deque[bytes] = deque(maxlen=MAX_ARRIVALS)
        """Tickets of deliveries that were lost with a link: the peer is told as soon as it can be."""
        self._lock = threading.Lock()

    def open(self) -> None:
        """See to it that there is a link.

        Raises:
            PoolError: the peer cannot be reached.
        """
        with self._lock, self._losing():
            self._open(transport.GREETING_S)

    def deliver(self, ticket: bytes, source: torch.Tensor) -> None:
        """Deliver bytes under a ticket; they may change after.

        Raises:
            PoolError: the peer is gone, or was for longer than the grace.
        """
        total = source.numel()
        with self._lock, self._losing():
            link = self._open(transport.REDIAL_S)
            for offset in range(0, max(total, 1), CHUNK_BYTES):
                data = source[offset : offset + CHUNK_BYTES].cpu().numpy().data
                # The link keeps it until the peer has it: see `Link.send`.
                kept = memoryview(bytes(data)) if total <= COPIED_BYTES else data
                link.send(wire.Deliver(ticket, total, offset), kept)
            if total > COPIED_BYTES and source.device.type == "cpu":  # else the parts are copies already
                link.settle()

    def withhold(self, ticket: bytes, failure: Failure) -> None:
        """Say that what the peer may wait for under a ticket never comes.

        Raises:
            PoolError: as `deliver`.
        """
        with self._lock, self._losing():
            message = wire.Withhold(ticket, failure.kind, str(failure)[: wire.MAX_TEXT])
            self._open(transport.REDIAL_S).send(message)

    def keep(self) -> None:
        """For ever: take in what the peer has, mend what breaks, and begin anew where that failed."""
        while True:
            time.sleep(LOOK_S)
            with contextlib.suppress(PoolError), self._lock, self._losing():
                link = self._open(transport.REDIAL_S)
                while link.has_input():
                    if (said := link.take()) is not None:
                        raise WireError(f"the other worker says what nobody asked for: {type(said[0]).__name__}")

    def _open(self, connect_s: float) -> Link:
        if self._link is not None:
            return self._link
        connection = self._dial(connect_s)
        attach = wire.Attach(secrets.token_bytes(16), device=self._own)
        connection.send(attach)
        redial = Dialler(lambda: self._dial(transport.REDIAL_S), attach, self._grace_s, why_ended=lambda: "")
        self._link, self._lost = Link(connection, redial), None
        while self._owed:
            self._link.send(wire.Withhold(self._owed[0], "runtime", "it was lost with the connection to the device"))
            self._owed.popleft()
        return self._link

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        """Drop a link that is lost; say again why it was, as long as there is no other."""
        try:
            yield
        except PoolError as error:
            if self._link is not None:
                self._link.close()
                kept = (m for m in self._link.kept() if isinstance(m, wire.Deliver | wire.Withhold))
                self._owed.extend(dict.fromkeys(m.ticket for m in kept))
                self._link, self._lost = None, (time.monotonic(), str(error))
            elif self._lost is not None:
                at, why = self._lost
                raise ConnectionLost(f"{why}; that was {time.monotonic() - at:.0f} s ago") from None
            raise


@dataclass(frozen=True)
class _Caller:
    """Another worker that delivers to us: `device` is its number in the lease."""

    device: int
    link: Link
    berth: Berth


class Peers:
    """A worker's side of the copies of its lease."""

    def __init__(
        self, token: str, bind: str, memory: Memory, torch_version: str, files: tls.Files, grace_s: float
    ) -> None:
        self.listener = transport.listen(bind, 0)
        self.arrivals = Arrivals(memory)
        self._token = token
        self._torch = torch_version
        self._grace_s = grace_s
        # The token is proof enough of a peer, and its certificate may be good for listening only.
        self._security = tls.listener(files.for_workers(asks_certificate=False))
        self._introduction: Introduction | None = None
        self._introduced = threading.Event()
        self._ways: dict[int, Way] = {}
        self._callers: dict[bytes, _Caller] = {}
        """By what each calls its deliveries, over all of its connections."""
        self._calls = 0
        self._lock = threading.Lock()

    @property
    def port(self) -> int:
        """Where peers deliver."""
        return int(self.listener.getsockname()[1])

    def introduce(self, introduction: Introduction) -> None:
        """Take the broker's word for who the peers are."""
        for index, address in enumerate(introduction.peers):
            if index != introduction.own:
                self._ways[index] = Way(functools.partial(self._dial, address), introduction.own, self._grace_s)
        self._introduction = introduction
        self._introduced.set()
        threading.Thread(target=self._meet, name="meet", daemon=True).start()

    def _meet(self) -> None:
        """Connect to every peer: a firewall between two is to end the lease at its start, not a copy after an hour."""
        for peer, way in self._ways.items():
            try:
                way.open()
            except PoolError as error:
                sys.stderr.write(f"{self._unreachable(peer, error)}\n")
                sys.stderr.flush()
                os._exit(1)
            threading.Thread(target=way.keep, name="keep", daemon=True).start()

    # --- what we send --------------------------------------------------------------------------------------------

    def send(self, peer: int, ticket: bytes, source: torch.Tensor) -> None:
        """Deliver bytes to a peer under a ticket; they may change after.

        Raises:
            Failure: there is no such peer, or it cannot be reached.
        """
        try:
            self._way(peer).deliver(ticket, source)
        except PoolError as error:
            raise self._unreachable(peer, error) from None

    def withhold(self, peer: int, ticket: bytes, failure: Failure) -> None:
        """Tell a peer, if it can be told, that what it may wait for never comes."""
        with contextlib.suppress(Failure, PoolError):
            self._way(peer).withhold(ticket, failure)

    def _way(self, peer: int) -> Way:
        if not self._introduced.wait(INTRODUCE_S):
            raise Failure("runtime", "the broker has not said where the other devices of the lease are")
        if peer not in self._ways:
            raise Failure("refused", f"device {peer} is no other device of this lease")
        return self._ways[peer]

    def _dial(self, address: wire.PeerAddress, connect_s: float) -> transport.Connection:
        connection, _ = transport.connect(
            address.host,
            address.port,
            self._token,
            self._torch,
            sends="to-peer",
            receives="from-peer",
            security=tls.of_peer(address.certificate) if self._security else None,
            connect_s=connect_s,
        )
        # Beyond what keep-alive sees: a process that stands still, while its host answers for it.
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SEND_S * 1000))
        return connection

    def _unreachable(self, peer: int, error: PoolError) -> Failure:
        known = self._introduction
        assert known is not None  # we were told where it is
        there, here = known.peers[peer], known.peers[known.own]
        return Failure(
            "runtime",
            f"the worker of device {peer} of this lease cannot be reached at {there.host}:{there.port} from that of "
            f"device {known.own} at {here.host}: {error}. Workers of a lease must reach each other: is a firewall "
            "between their hosts, or the network broken?",
        )

    # --- what comes ----------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Take in what peers deliver, for ever."""
        while True:
            sock, _ = self.listener.accept()
            with self._lock:
                full = self._calls >= MAX_CALLERS
                self._calls += not full
            if full:
                sock.close()
                continue
            threading.Thread(target=self._attend, args=(sock,), name="peer", daemon=True).start()

    def claim(self, peer: int, ticket: bytes) -> torch.Tensor:
        """Return the bytes that come from a peer under a ticket, once they are here; they count no more as memory.

        Raises:
            Failure: they do not come.
        """
        way = f"from device {peer} of this lease"
        if (known := self._introduction) is not None and peer < len(known.peers):
            way += f" at {known.peers[peer].host} to device {known.own} at {known.peers[known.own].host}"
        return self.arrivals.claim(peer, ticket, way)

    def _attend(self, sock: socket.socket) -> None:
        try:
            connection, _ = transport.accept(
                sock, self._token, self._torch, sends="from-peer", receives="to-peer", security=self._security
            )
            try:
                attach, _ = connection.receive(transport.GREETING_S, _no_payload)
                if not isinstance(attach, wire.Attach):
                    raise WireError("the first message must attach")
            except BaseException:
                connection.close()
                raise
            if attach.resumes:
                self._resume(connection, attach)
            else:
                self._begin(connection, attach)
        except (ConnectionLost, HandshakeError, TimeoutError, OSError):
            pass
        except WireError as error:
            print(f"worker: dropped a peer: {error}", file=sys.stderr)  # noqa: T201
        finally:
            with self._lock:
                self._calls -= 1

    def _resume(self, connection: transport.Connection, attach: wire.Attach) -> None:
        """Hand a connection to the deliveries that go on over it."""
        with self._lock:
            known = self._callers.get(attach.session)
        if known is None:
            _refuse(connection, "its deliveries have been given up: it was away for too long")
            return
        known.link.close()  # before the new one is handed over, which must not be the one to be closed
        known.berth.come_back(connection, attach.received)

    def _begin(self, connection: transport.Connection, attach: wire.Attach) -> None:
        """Take in what a peer delivers, until it is gone for good."""
        berth = Berth(self._grace_s)
        caller = _Caller(attach.device, Link(connection, berth), berth)
        with self._lock:
            known = attach.session in self._callers
            if not known:
                for other in self._callers.values():
                    if other.device == caller.device and other.berth.is_waiting:  # it has begun anew
                        other.berth.give_up()
                self._callers[attach.session] = caller
                self.arrivals.find(caller.device)
        if known:
            _refuse(connection, "these deliveries have begun already")
            return
        why = "it sent what it may not"
        try:
            self._take_in(caller.link)
        except ConnectionLost as error:
            why = str(error)
        finally:
            with self._lock:
                del self._callers[attach.session]
                self.arrivals.break_off(caller.link)
                if all(other.device != caller.device for other in self._callers.values()):
                    self.arrivals.lose(caller.device, why)
            caller.link.close()

    def _take_in(self, link: Link) -> None:
        scratch = memoryview(b"")

        def place(message: wire.Message, length: int) -> memoryview:
            nonlocal scratch
            if not isinstance(message, wire.Deliver) or length > CHUNK_BYTES:
                raise WireError(f"{length} bytes where no peer sends so many")
            data = self.arrivals.place(message, length, link)
            if data is None:
                scratch = scratch if len(scratch) >= length else memoryview(bytearray(CHUNK_BYTES))
                return scratch[:length]
            return data.numpy().data[message.offset : message.offset + length]

        while True:
            message, payload = link.receive(place)
            if isinstance(message, wire.Withhold):
                self.arrivals.withhold(message, link)
            elif isinstance(message, wire.Deliver):
                self.arrivals.add(message, len(payload), link)
            else:
                raise WireError("a peer attaches once a connection")


def _no_payload(message: wire.Message, length: int) -> memoryview:
    raise WireError(f"{length} bytes before the deliveries have begun")


def _refuse(connection: transport.Connection, why: str) -> None:
    with contextlib.suppress(ConnectionLost):
        connection.send(wire.Refused("lease", why))
    connection.close()


class PeerExecutor(GraphExecutor):
    """An executor that also sends tensors to the lease's other workers, and receives theirs."""

    def __init__(self, device: torch.device, memory: Memory, peers: Peers | None) -> None:
        super().__init__(device, memory)
        self._peers = peers

    def _run(self, item: wire.Item, payload: memoryview) -> tuple[wire.Message, memoryview] | None:
        if isinstance(item, wire.Send):
            self._send(item, self._others())
        elif isinstance(item, wire.Receive):
            self._receive(item, self._others())
        else:
            return super()._run(item, payload)
        return None

    def _others(self) -> Peers:
        if self._peers is None:
            raise Failure("refused", "this lease has one device only")
        return self._peers

    def _send(self, item: wire.Send, peers: Peers) -> None:
        try:
            peers.send(item.peer, item.ticket, bytes_of(self._tensor(item.handle)))
        except (Failure, RuntimeError, MemoryError) as error:
            peers.withhold(item.peer, item.ticket, failure_of(error))
            raise

    def _receive(self, item: wire.Receive, peers: Peers) -> None:
        believed = Believed(item.geometry)
        data = peers.claim(item.peer, item.ticket)
        if data.numel() != believed.bytes:
            raise Failure("refused", f"{data.numel()} bytes came for a tensor of {believed.bytes}")
        self._require(believed.bytes)
        host = torch.empty(0, dtype=believed.dtype).set_(data.untyped_storage(), 0, believed.sizes, believed.strides)
        self._keep(item.handle, host.to(self.device))

    def _poison(self, item: wire.Item, failure: Failure) -> None:
        if isinstance(item, wire.Receive):
            self._drop([item.handle])
            self._tensors[item.handle] = failure
        else:
            super()._poison(item, failure)
