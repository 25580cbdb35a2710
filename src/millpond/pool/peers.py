"""Copies between the workers of one lease: the bytes go from the one to the other, and never through the client.

The broker alone tells a worker who its peers are, and gives them a token of their own. A copy is a `send` at the one
and a `receive` at the other, which the client joins by a ticket that nobody can guess. A worker always takes in what
comes, into memory of the lease, so that two that send to each other never wait for each other.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

import torch

from millpond.pool import tls, transport, wire
from millpond.pool.errors import ConnectionLost, HandshakeError, PoolError, WireError
from millpond.pool.executor import Believed, Failure, Memory, bytes_of, typed
from millpond.pool.graphs import GraphExecutor
from millpond.pool.worker import Introduction

CHUNK_BYTES = 4 * 1024 * 1024
"""Bytes that travel in one frame, and that a delivery which is refused is read into."""
MAX_ARRIVALS = 4096
"""Deliveries that wait for their `receive`."""
RECEIVE_S = 300.0
"""How long a `receive` waits: the sender may have much to compute before it gets to its `send`."""
KEEP_S = 600.0
"""How long a delivery waits for its `receive`."""
SEND_S = 30.0
"""How long a peer may take nothing in before it counts as gone."""
INTRODUCE_S = 10.0
"""How long the broker's word on the peers may take, once a client has been told of the lease."""
MAX_CALLERS = 1024
"""Connections to a worker's peers' port; a further one is hung up on."""


class _Arrival:
    """A delivery: bytes that came, or are coming, under a ticket."""

    def __init__(self, total: int, connection: object) -> None:
        self.total = total
        self.connection = connection
        self.received = 0
        self.data: torch.Tensor | None = None
        self.failure: Failure | None = None
        self.expires = time.monotonic() + KEEP_S

    @property
    def is_over(self) -> bool:
        return self.failure is not None or (self.data is not None and self.received == self.total)


class Peers:
    """A worker's side of the copies of its lease."""

    def __init__(self, token: str, bind: str, memory: Memory, torch_version: str, files: tls.Files) -> None:
        self.listener = transport.listen(bind, 0)
        self._token = token
        self._memory = memory
        self._torch = torch_version
        # The token is proof enough of a peer, and its certificate may be good for listening only.
        self._security = tls.listener(files.for_workers(asks_certificate=False))
        self._introduction: Introduction | None = None
        self._introduced = threading.Event()
        self._connections: dict[int, transport.Connection] = {}
        self._sending: dict[int, threading.Lock] = {}
        self._arrivals: dict[bytes, _Arrival] = {}
        self._arrived = threading.Condition()
        self._callers = 0

    @property
    def port(self) -> int:
        """Where peers deliver."""
        return int(self.listener.getsockname()[1])

    def introduce(self, introduction: Introduction) -> None:
        """Take the broker's word for who the peers are."""
        self._sending = {index: threading.Lock() for index in range(len(introduction.peers))}
        self._introduction = introduction
        self._introduced.set()
        threading.Thread(target=self._meet, args=(introduction,), name="meet", daemon=True).start()

    def _meet(self, introduction: Introduction) -> None:
        """Connect to every peer: a firewall between two is to end the lease at its start, not a copy after an hour."""
        for peer in range(len(introduction.peers)):
            if peer == introduction.own:
                continue
            try:
                self._with_peer(peer, lambda connection: None)
            except Failure as failure:
                sys.stderr.write(f"{failure}\n")
                sys.stderr.flush()
                os._exit(1)

    # --- what we send --------------------------------------------------------------------------------------------

    def send(self, peer: int, ticket: bytes, source: torch.Tensor) -> None:
        """Deliver bytes to a peer under a ticket; returns when the kernel has them.

        Raises:
            Failure: there is no such peer, or it cannot be reached.
        """
        total = source.numel()

        def deliver(connection: transport.Connection) -> None:
            for offset in range(0, max(total, 1), CHUNK_BYTES):
                part = source[offset : offset + CHUNK_BYTES].cpu()
                connection.send(wire.Deliver(ticket, total, offset), part.numpy().data)

        self._with_peer(peer, deliver)

    def withhold(self, peer: int, ticket: bytes, failure: Failure) -> None:
        """Tell a peer, if it can be told, that what it may wait for never comes."""
        with contextlib.suppress(Failure):
            message = wire.Withhold(ticket, failure.kind, str(failure)[: wire.MAX_TEXT])
            self._with_peer(peer, lambda connection: connection.send(message))

    def _with_peer(self, peer: int, action: Callable[[transport.Connection], None]) -> None:
        if not self._introduced.wait(INTRODUCE_S) or self._introduction is None:
            raise Failure("runtime", "the broker has not said where the other devices of the lease are")
        known = self._introduction
        if peer == known.own or not 0 <= peer < len(known.peers):
            raise Failure("refused", f"device {peer} is no other device of this lease")
        with self._sending[peer]:
            try:
                action(self._connect(peer, known.peers[peer]))
            except PoolError as error:
                if (broken := self._connections.pop(peer, None)) is not None:
                    broken.close()
                where = f"{known.peers[peer].host}:{known.peers[peer].port}"
                raise Failure(
                    "runtime",
                    f"the worker of device {peer} of this lease cannot be reached at {where}: {error}. Workers of a "
                    "lease must reach each other: is a firewall between their hosts?",
                ) from None

    def _connect(self, peer: int, address: wire.PeerAddress) -> transport.Connection:
        connection = self._connections.get(peer)
        if connection is not None and connection.has_input():  # a peer says nothing: it has hung up
            connection.close()
            connection = None
        if connection is None:
            connection, _ = transport.connect(
                address.host,
                address.port,
                self._token,
                self._torch,
                sends="to-peer",
                receives="from-worker",
                security=tls.of_peer(address.certificate) if self._security else None,
            )
            # Beyond what keep-alive sees: a process that stands still, while its host answers for it.
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SEND_S * 1000))
            self._connections[peer] = connection
        return connection

    # --- what comes ----------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Take in what peers deliver, for ever."""
        while True:
            sock, _ = self.listener.accept()
            with self._arrived:
                full = self._callers >= MAX_CALLERS
                self._callers += not full
            if full:
                sock.close()
                continue
            threading.Thread(target=self._attend, args=(sock,), name="peer", daemon=True).start()

    def _attend(self, sock: socket.socket) -> None:
        try:
            connection, _ = transport.accept(
                sock, self._token, self._torch, sends="from-worker", receives="to-peer", security=self._security
            )
            with connection:
                self._take_in(connection)
        except (ConnectionLost, HandshakeError, TimeoutError, OSError):
            pass
        except WireError as error:
            print(f"worker: dropped a peer: {error}", file=sys.stderr)  # noqa: T201
        finally:
            with self._arrived:
                self._callers -= 1

    def _take_in(self, connection: transport.Connection) -> None:
        scratch = memoryview(b"")

        def place(message: wire.Message, length: int) -> memoryview:
            nonlocal scratch
            if not isinstance(message, wire.Deliver) or length > CHUNK_BYTES:
                raise WireError(f"{length} bytes where no peer sends so many")
            data = self._place(message, length, connection)
            if data is None:
                scratch = scratch if len(scratch) >= length else memoryview(bytearray(CHUNK_BYTES))
                return scratch[:length]
            return data.numpy().data[message.offset : message.offset + length]

        try:
            while True:
                message, payload = connection.receive(None, place)
                with self._arrived:
                    if isinstance(message, wire.Withhold):
                        self._fail(self._known(message.ticket, 0, connection), Failure(message.kind, message.message))
                    elif isinstance(message, wire.Deliver):
                        self._place(message, len(payload), connection)
                        if (arrival := self._arrivals.get(message.ticket)) is not None:
                            arrival.received += len(payload)
                    self._arrived.notify_all()
        finally:
            with self._arrived:
                for arrival in self._arrivals.values():
                    if arrival.connection is connection and not arrival.is_over:
                        self._fail(arrival, Failure("runtime", "the connection broke on the way from the other device"))
                self._arrived.notify_all()

    def _place(self, message: wire.Deliver, length: int, connection: object) -> torch.Tensor | None:
        """Return the memory of a delivery that goes on as it should; None for one that was refused or given up."""
        with self._arrived:
            new = message.ticket not in self._arrivals
            if new and message.offset > 0:
                return None
            arrival = self._known(message.ticket, message.total, connection)
            if arrival.connection is not connection or arrival.total != message.total:
                raise WireError("two deliveries under one ticket")
            if message.offset != arrival.received or message.offset + length > arrival.total:
                raise WireError(f"{length} bytes at {message.offset} of {arrival.total}; {arrival.received} have come")
            if new:
                try:
                    self._memory.check(arrival.total)
                    arrival.data = typed(lambda: torch.empty(arrival.total, dtype=torch.uint8))
                    self._memory.add(arrival.total)
                except Failure as failure:
                    arrival.failure = failure.again()
            return arrival.data

    def _known(self, ticket: bytes, total: int, connection: object) -> _Arrival:
        if ticket not in self._arrivals:
            if len(self._arrivals) >= MAX_ARRIVALS:  # what failed goes first: it waits only to say why
                self._arrivals = {known: arrival for known, arrival in self._arrivals.items() if not arrival.failure}
            if len(self._arrivals) >= MAX_ARRIVALS:
                raise WireError(f"{MAX_ARRIVALS} deliveries wait already")
            self._arrivals[ticket] = _Arrival(total, connection)
        return self._arrivals[ticket]

    def _fail(self, arrival: _Arrival, failure: Failure) -> None:
        self._drop(arrival)
        arrival.failure = failure

    def _drop(self, arrival: _Arrival) -> None:
        if arrival.data is not None:
            arrival.data = None
            self._memory.add(-arrival.total)

    def expire(self) -> None:
        """Drop deliveries that nobody has come for."""
        now = time.monotonic()
        with self._arrived:
            for ticket in [ticket for ticket, arrival in self._arrivals.items() if arrival.expires < now]:
                self._drop(self._arrivals.pop(ticket))

    def claim(self, peer: int, ticket: bytes) -> torch.Tensor:
        """Return the bytes that come from a peer under a ticket, once they are here; they count no more as memory.

        Raises:
            Failure: they do not come.
        """
        with self._arrived:
            self._arrived.wait_for(lambda: ticket in self._arrivals and self._arrivals[ticket].is_over, RECEIVE_S)
            arrival = self._arrivals.get(ticket)
            if arrival is None or not arrival.is_over:
                if arrival is not None:
                    self._fail(arrival, Failure("runtime", "it came too late"))
                raise Failure("runtime", f"nothing has come from device {peer} of this lease for {RECEIVE_S:g} s")
            del self._arrivals[ticket]
            if arrival.failure is not None:
                failure = arrival.failure
                raise Failure(failure.kind, f"{failure}\n  on the way from device {peer} of this lease")
            data = arrival.data
            assert data is not None
            self._drop(arrival)
            return data


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
        except Failure as failure:
            peers.withhold(item.peer, item.ticket, failure)
            raise

    def _receive(self, item: wire.Receive, peers: Peers) -> None:
        believed = typed(lambda: Believed(item.geometry))
        data = peers.claim(item.peer, item.ticket)
        if data.numel() != believed.bytes:
            raise Failure("refused", f"{data.numel()} bytes came for a tensor of {believed.bytes}")
        self.memory.check(believed.bytes)
        host = torch.empty(0, dtype=believed.dtype).set_(data.untyped_storage(), 0, believed.sizes, believed.strides)
        self._keep(item.handle, typed(lambda: host.to(self.device)))

    def _poison(self, item: wire.Item, failure: Failure) -> None:
        if isinstance(item, wire.Receive):
            self._drop([item.handle])
            self._tensors[item.handle] = failure
        else:
            super()._poison(item, failure)
