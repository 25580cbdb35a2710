"""The broker: lends the devices of its hosts, has a worker run on each that is lent, and ends them with the lease.

The decisions are the scheduler's; here are the sockets, clock and disk. Its own host is one of the hosts, others join.
It runs in one thread and loads no torch. A client's lease hangs on its connection, a worker on its host's part in the
pool, its own host on it; nothing outlives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import ipaddress
import itertools
import logging
import secrets
import signal
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from millpond import __version__
from millpond.pool import handshake, lease, ray_jobs, tls, transport, wire
from millpond.pool.errors import HandshakeError, LeaseError, WireError
from millpond.pool.host import WORKER_COMMAND, Host, OwnHost
from millpond.pool.joined import JoinedHost
from millpond.pool.monitor import find_devices
from millpond.pool.records import Records, hold
from millpond.pool.scheduler import Decision, Device, End, Lease, Scheduler, Start, Stop, Wait, gib, recall
from millpond.settings import PoolSettings, check_exposure

MAX_CLIENTS = 256
"""Connections of clients that have proved who they are; each has one lease at most."""
MAX_GREETING = 64
"""Connections of callers that have not; a further one displaces the oldest."""
MAX_HOSTS = 64
"""Hosts that may join."""
TICK_S = 0.25
STOP_S = 5.0
"""How long the ends of workers and connections may take when the broker stops."""
HANG_UP_S = 1.0
"""How long the other end may take with its part in ending a connection: TLS has it say goodbye."""

log = logging.getLogger("millpond.pool")


def serve(
    settings: PoolSettings,
    *,
    devices: Sequence[Device] | None = None,
    worker_command: Sequence[str] = WORKER_COMMAND,
) -> None:
    """Lend `devices` (None: this host's) until SIGTERM or Ctrl-C; prints where it listens and what it lends.

    `worker_command` starts a worker; it is given its orders, and reports, as `worker.main`.

    Raises:
        SettingsError: bound beyond loopback without a token, or a setting cannot be used.
        PoolError: the port is taken, the devices cannot be used, or another broker has the records.
    """
    check_exposure("pool", settings.bind, token=settings.token)
    lease.check_heartbeat(settings)
    with hold(settings.home / "pool") as records, transport.listen(settings.bind, settings.port) as listener:
        devices = find_devices(settings.memory) if devices is None else devices
        broker = Broker(settings, devices, records, worker_command)
        asyncio.run(broker.run(listener, lambda: _announce(broker, listener)))


def _announce(broker: Broker, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    devices = [f"  device {d.index}: {d.name}, {gib(d.memory_bytes)}" for d in broker.scheduler.devices]
    print(f"millpond pool: listening on {f'[{host}]' if ':' in host else host}:{port}", *devices, sep="\n", flush=True)  # noqa: T201


class Client:
    """A connection of a client that has proved who it is."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.lease: Lease | None = None

    def send(self, message: wire.Message) -> None:
        """Send a message, unless the client is gone."""
        if not self.writer.is_closing():
            self.writer.write(wire.encode(message))


class Worker:
    """A worker of a lease, wherever it runs."""

    def __init__(self, number: int, device: Device, host: Host) -> None:
        self.number = number
        self.device = device
        self.host = host
        self.report: wire.WorkerReport | None = None
        self.ready = asyncio.Event()
        """Set when it listens, and when it has ended."""

    def kill(self) -> None:
        """End it."""
        self.host.end_worker(self.number)


class Broker:
    """One pool."""

    def __init__(
        self,
        settings: PoolSettings,
        devices: Sequence[Device],
        records: Records,
        worker_command: Sequence[str],
    ) -> None:
        self.settings = settings
        self.records = records
        files = tls.Files.of(settings)
        self.security = tls.listener(files)
        own = OwnHost(socket.gethostname()[:64], settings.bind, worker_command, files, ray_jobs.Site.of(settings))
        self.hosts: dict[str, Host] = {own.name: own} if devices else {}
        runs_jobs = own.jobs is not None
        devices = [dataclasses.replace(device, host=own.name, jobs=runs_jobs) for device in devices]
        self._indices = {(own.name, place): device.index for place, device in enumerate(devices)}
        """Numbers of the devices of all hosts that were ever here: one that comes back has the same again."""
        self._numbers = itertools.count()
        self.torch = lease.torch_version()
        self._clock_offset = time.time() - time.monotonic()
        self.scheduler = Scheduler(devices, settings.grace_s, settings.idle_limit_s, recall(records.load(), self.now()))
        self._greeting: dict[asyncio.StreamWriter, None] = {}
        self._clients: dict[asyncio.StreamWriter, Client] = {}
        self._workers: dict[str, list[Worker]] = {}
        self._tokens: dict[str, str] = {}
        """By lease: the token of its workers, which also proves whose it is."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()

    def now(self) -> float:
        """Return seconds since 1970, never going back."""
        return time.monotonic() + self._clock_offset

    async def run(self, listener: socket.socket, on_ready: Callable[[], None]) -> None:
        """Serve on a listening socket until SIGTERM, Ctrl-C or `stop`; then end every worker and connection."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        self._save()
        server = await asyncio.start_server(self._attend, sock=listener, backlog=MAX_CLIENTS)
        try:
            on_ready()
            last = self.now()
            while not self._stop.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), TICK_S)
                now = self.now()
                if now - last > TICK_S + min(2.0, self.settings.grace_s / 4):
                    # We were held up, not the clients: what they sent meanwhile is not read yet.
                    for known in self.scheduler.leases.values():
                        self.scheduler.client_heard(now, known.id)
                    for host in self._joined():
                        host.was_held_up(now)
                last = now
                for host in self._joined():
                    if why := host.why_lost(now, self.settings.grace_s):
                        self._lose_host(host, why)
                self._carry_out(self.scheduler.tick(now))
        finally:
            server.close()
            await self._end_all()

    def stop(self) -> None:
        """Have `run` return."""
        self._stop.set()

    async def _end_all(self) -> None:
        for known in [known for known in self.scheduler.leases.values() if known.is_live]:
            self._end(known, "failed", "the broker was stopped")
        for host in self._joined():
            self._lose_host(host, "the broker was stopped")
        for writer in [*self._greeting, *self._clients]:
            writer.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_S)

    # --- callers -------------------------------------------------------------------------------------------------

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while len(self._greeting) >= MAX_GREETING:
            oldest = next(iter(self._greeting))
            del self._greeting[oldest]
            oldest.transport.abort()
        self._greeting[writer] = None
        try:
            async with asyncio.timeout(transport.GREETING_S):
                name = await self._greet(reader, writer)
        except (WireError, HandshakeError, OSError, EOFError) as error:
            level = logging.WARNING if isinstance(error, (HandshakeError, ssl.SSLError)) else logging.DEBUG
            log.log(level, "refused a caller from %s: %s", _peer(writer), error or "it was silent")
            _hang_up(writer)
            return
        finally:
            self._greeting.pop(writer, None)
        client = Client(writer)
        if len(self._clients) >= MAX_CLIENTS:
            client.send(wire.Refused("busy", f"{MAX_CLIENTS} clients are connected already. Try again later."))
            _hang_up(writer)
            return
        self._clients[writer] = client
        log.debug("%s connected from %s", name, _peer(writer))
        try:
            while True:
                async with asyncio.timeout(2 * self.settings.grace_s):  # the scheduler ends leases long before
                    message = await _receive(reader, "to-broker")
                if isinstance(message, wire.Join):
                    return await self._keep_host(client, message, reader)
                self._handle(client, message)
                async with asyncio.timeout(2 * self.settings.grace_s):
                    await writer.drain()
        except WireError as error:
            why = f"its client sent what it may not: {error}"[:1000]
            client.send(wire.Refused("malformed", why))
            if client.lease is not None:
                self._end(client.lease, "failed", why)
        except TimeoutError:
            pass  # the scheduler has ended its lease
        except (OSError, EOFError) as error:
            if client.lease is not None and not transport.is_silence(error):
                self._carry_out(self.scheduler.client_left(self.now(), client.lease.id))
        finally:
            del self._clients[writer]
            _hang_up(writer)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        if self.security is not None:
            # At once, before anything that came is read; not by start_server, which would not bound who greets.
            await writer.start_tls(self.security.context, ssl_handshake_timeout=transport.GREETING_S)
        channel = self.security.channel if self.security else b""
        opening = handshake.challenge()
        writer.write(wire.encode(opening))
        hello = await _receive(reader, "greeting")
        try:
            if not isinstance(hello, wire.Hello):
                raise WireError("it did not greet")
            welcome = handshake.admit(opening, hello, self.settings.token, self.torch, channel=channel)
            writer.write(wire.encode(welcome))
        except HandshakeError as error:
            writer.write(wire.encode(handshake.refusal(error, self.torch)))
            raise
        return hello.name

    def _handle(self, client: Client, message: wire.Message) -> None:
        if isinstance(message, wire.Heartbeat):
            if client.lease is not None:
                self.scheduler.client_heard(self.now(), client.lease.id)
            client.send(message)
        elif isinstance(message, wire.GetStatus):
            client.send(self.status())
        elif isinstance(message, wire.Acquire):
            self._request(client, message)
        elif isinstance(message, wire.Reattach):
            self._reattach(client, message)
        elif isinstance(message, wire.Release):
            if client.lease is None:
                raise WireError("there is no lease to release")
            self._end(client.lease, "released", "its client gave it back")

    def _request(self, client: Client, wanted: wire.Acquire) -> None:
        if client.lease is not None:
            raise WireError("a connection has one lease")
        lease_id = f"lease-{secrets.token_hex(4)}"
        try:
            decisions = self.scheduler.request(
                self.now(),
                lease_id,
                wanted.owner,
                wanted.devices,
                wanted.memory_bytes,
                wanted.wait_s,
                job=wanted.job,
            )
        except LeaseError as error:
            client.send(wire.Refused("lease", str(error)))
            return
        client.lease = self.scheduler.leases[lease_id]
        self._carry_out(decisions)

    def _reattach(self, client: Client, wanted: wire.Reattach) -> None:
        """Give a client its lease back, on the connection that it now has."""
        if client.lease is not None:
            raise WireError("a connection has one lease")
        known = self.scheduler.leases.get(wanted.lease)
        if known is not None and not known.is_live:
            client.send(wire.LeaseEnded(known.id, known.state, known.reason))  # type: ignore[arg-type]
        elif known is None or not hmac.compare_digest(wanted.token, self._tokens.get(known.id, "")):
            client.send(wire.Refused("lease", f"this pool knows no {wanted.lease} of yours"))
        else:
            for other in self._clients.values():
                if other.lease is known:  # a connection whose end we have not noticed yet
                    other.lease = None
                    _hang_up(other.writer)
            client.lease = known
            self.scheduler.client_heard(self.now(), known.id)
            client.send(wire.Heartbeat())

    # --- hosts ---------------------------------------------------------------------------------------------------

    def _joined(self) -> list[JoinedHost]:
        return [host for host in self.hosts.values() if isinstance(host, JoinedHost)]

    async def _keep_host(self, client: Client, join: wire.Join, reader: asyncio.StreamReader) -> None:
        """Lend a host's devices, new ones or those of one that has come back, for as long as its connection stands."""
        if client.lease is not None:
            raise WireError("a connection is a client's or a host's")
        known = self.hosts.get(join.name)
        if isinstance(known, JoinedHost) and join.resumes and hmac.compare_digest(known.session, join.session):
            known.come_back(client.writer, self.now())
            log.info("host %s is back from %s", known.name, _peer(client.writer))
            known.send(wire.Joined(resumed=True))
            self._carry_out(self.scheduler.host_back(self.now(), known.name))
            await self._attend_host(known, client.writer, reader)
            return
        if known is not None:
            client.send(wire.Refused("busy", f"host {join.name} is in the pool already. Join as another: --name."))
            return
        if len(self.hosts) > MAX_HOSTS:
            client.send(wire.Refused("busy", f"{MAX_HOSTS} hosts have joined already."))
            return
        host = self.hosts[join.name] = JoinedHost(join.name, join.session, client.writer, self.now())
        log.info("host %s joined from %s with %d device(s)", host.name, _peer(client.writer), len(join.devices))
        host.send(wire.Joined())
        self._carry_out(self.scheduler.host_joined(self.now(), self._devices_of(join)))
        await self._attend_host(host, client.writer, reader)

    async def _attend_host(self, host: JoinedHost, writer: asyncio.StreamWriter, reader: asyncio.StreamReader) -> None:
        """Take in what a host says over a connection, until that ends; it may come back over another."""
        try:
            while host.is_served_by(writer):
                message = await _receive(reader, "from-host")
                if isinstance(message, wire.Leave):
                    self._lose_host(host, "it has left")
                else:
                    host.take(message)
                    host.heard = self.now()
        except WireError as error:
            if host.is_served_by(writer):
                self._lose_host(host, f"it sent what it may not: {error}"[:1000])
        except (OSError, EOFError) as error:
            if host.is_served_by(writer):
                log.warning("the connection of host %s broke; it may come back", host.name)
                host.note_break(error, self.now())
                self.scheduler.host_away(host.name)

    def _lose_host(self, host: JoinedHost, why: str) -> None:
        log.warning("host %s is lost: %s", host.name, why)
        del self.hosts[host.name]
        self._carry_out(self.scheduler.host_lost(self.now(), host.name))
        host.lose(why)

    def _devices_of(self, join: wire.Join) -> list[Device]:
        return [
            Device(
                self._indices.setdefault((join.name, place), len(self._indices)),
                device.name,
                device.torch_name,
                device.memory_bytes,
                join.name,
                join.jobs,
            )
            for place, device in enumerate(join.devices)
        ]

    def status(self) -> wire.Status:
        """Return the pool at this moment; leases newest first."""
        scheduler = self.scheduler
        return wire.Status(
            __version__,
            self.torch,
            [
                wire.DeviceStatus(
                    device.index,
                    device.name,
                    device.memory_bytes,
                    scheduler.free_bytes(device),
                    device.host,
                    device.jobs,
                )
                for device in scheduler.devices
            ],
            [self._lease_status(known) for known in reversed(scheduler.leases.values())],
        )

    def _lease_status(self, known: Lease) -> wire.LeaseStatus:
        used = [worker.report.used_bytes for worker in self._workers.get(known.id, []) if worker.report]
        return wire.LeaseStatus(
            known.id,
            known.owner,
            known.state,
            known.reason,
            [device.index for device in known.devices],
            known.memory_bytes,
            sum(used),
            _date(known.created),
            _date(known.changed),
        )

    # --- leases --------------------------------------------------------------------------------------------------

    def _end(self, known: Lease, state: End, reason: str) -> None:
        self._carry_out(self.scheduler.end(self.now(), known.id, state, reason))

    def _carry_out(self, decisions: Sequence[Decision]) -> None:
        if decisions:
            self._save()
        for decision in decisions:
            known = decision.lease
            match decision:
                case Wait():
                    self._tell(known, wire.Waiting(known.id, known.reason))
                case Start():
                    log.info("%s granted to %s: %s", known.id, known.owner, [device.index for device in known.devices])
                    self._workers[known.id] = [
                        Worker(next(self._numbers), device, self.hosts[device.host]) for device in known.devices
                    ]
                    task = asyncio.create_task(self._supervise(known))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                case Stop():
                    log.info("%s of %s %s: %s", known.id, known.owner, known.state, known.reason)
                    self._tell(known, wire.LeaseEnded(known.id, known.state, known.reason))  # type: ignore[arg-type]
                    for worker in self._workers.get(known.id, []):
                        worker.kill()

    def _tell(self, known: Lease, message: wire.Message) -> None:
        for client in self._clients.values():
            if client.lease is known:
                client.send(message)

    def _save(self) -> None:
        try:
            self.records.save(self.scheduler.leases.values())
        except OSError as error:  # the records are for people: lending goes on without them
            log.error("cannot save the records of leases: %s", error)

    # --- workers -------------------------------------------------------------------------------------------------

    async def _supervise(self, known: Lease) -> None:
        """Run a lease's workers until all have ended."""
        workers = self._workers[known.id]
        token = self._tokens[known.id] = secrets.token_urlsafe(32)
        peer_token = secrets.token_urlsafe(32) if len(workers) > 1 else ""
        running = [asyncio.create_task(self._run_worker(known, worker, token, peer_token)) for worker in workers]
        try:
            for worker in workers:
                await worker.ready.wait()
            if self.scheduler.workers_started(self.now(), known.id):
                self._save()
                if peer_token:
                    self._introduce(workers)
                self._grant(known, workers, token)
            await asyncio.wait(running)
        finally:
            del self._workers[known.id], self._tokens[known.id]
            self._carry_out(self.scheduler.workers_gone(self.now(), known.id))

    def _introduce(self, workers: Sequence[Worker]) -> None:
        """Tell the workers of a lease where the others are."""
        for own, worker in enumerate(workers):
            # A worker that bound to the broker's address is reached there; bound to all, from within by loopback.
            here = worker.host.broker_address if isinstance(worker.host, JoinedHost) else _reached(self.settings.bind)
            peers = [
                wire.PeerAddress(other.host.address or here, other.report.peer_port, other.report.certificate)
                for other in workers
                if other.report is not None
            ]
            worker.host.introduce(wire.Introduce(worker.number, own, peers))

    def _grant(self, known: Lease, workers: Sequence[Worker], token: str) -> None:
        for client in self._clients.values():
            if client.lease is known:
                # Bound to every address, we are reached by the client at the one that it chose.
                here = client.writer.get_extra_info("sockname")[0]
                addresses = [
                    wire.WorkerAddress(
                        worker.host.address or here,
                        worker.report.port,
                        token,
                        worker.report.pid,
                        worker.device.name,
                        known.bytes_on(worker.device),
                    )
                    for worker in workers
                    if worker.report is not None
                ]
                client.send(wire.Granted(known.id, addresses))

    async def _run_worker(self, known: Lease, worker: Worker, token: str, peer_token: str) -> None:
        """Run one worker until it ends; its end is the lease's."""

        def reported(report: wire.WorkerReport) -> None:
            worker.report = report
            self.scheduler.worked(self.now() - report.idle_s, known.id)
            worker.ready.set()

        why = "ended for an unknown reason"
        device = worker.device
        start = wire.StartWorker(
            worker.number,
            known.id,
            device.torch_name,
            known.bytes_on(device),
            token,
            peer_token,
            self.settings.grace_s,
            asks_certificate=self.security is not None and self.security.asks,
            job=known.job,
        )
        try:
            why = await worker.host.run_worker(start, reported) if known.is_live else "was not needed"
        finally:
            pid = f" {worker.report.pid}" if worker.report else ""
            on = f" of host {device.host}" if worker.host.address else ""
            self._end(known, "failed", f"worker{pid} of device {device.index}{on} {why}"[:1000])
            worker.ready.set()


async def _receive(reader: asyncio.StreamReader, direction: wire.Direction) -> wire.Message:
    """Return the next message; none that a broker takes is longer than a greeting, or has a payload."""
    header_bytes, _ = wire.measure(await reader.readexactly(wire.PREFIX.size), greeted=False)
    return wire.decode(await reader.readexactly(header_bytes), direction)


def _reached(bind: str) -> str:
    """Return where what is bound to `bind` is reached from the same machine."""
    with contextlib.suppress(ValueError):
        if (address := ipaddress.ip_address(bind)).is_unspecified:
            return "127.0.0.1" if address.version == 4 else "::1"
    return bind


def _hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    asyncio.get_running_loop().call_later(HANG_UP_S, writer.transport.abort)


def _peer(writer: asyncio.StreamWriter) -> str:
    name = writer.get_extra_info("peername")
    return str(name[0]) if name else "an unknown address"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
