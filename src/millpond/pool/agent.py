"""`millpond pool join`: offers this host's devices to a broker elsewhere, and runs the workers that it asks for.

Workers hang on this process. Its part in the pool outlives a break of its connection as a client's lease does: workers
go on, and both ends agree again on which there are. Past that their leases are over: they end, and the host joins anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import time
from collections import deque
from collections.abc import Sequence

from millpond.pool import lease, link, ray_jobs, tls, transport, wire
from millpond.pool.errors import ConnectionLost, LeaseError, PeerSilent, WireError
from millpond.pool.host import WORKER_COMMAND, OwnHost
from millpond.pool.monitor import find_devices
from millpond.pool.scheduler import Device, gib
from millpond.settings import PoolSettings, SettingsError

RETRY_S = 2.0
"""Pause between attempts to join."""
LOOK_S = 0.25
"""How long to wait for the broker's next message before looking whether there is anything else to do."""
STOP_S = 5.0
"""How long the ends of workers may take."""

log = logging.getLogger("millpond.pool")


def join(
    settings: PoolSettings,
    name: str,
    *,
    devices: Sequence[Device] | None = None,
    worker_command: Sequence[str] = WORKER_COMMAND,
) -> None:
    """Offer `devices` (None: this host's) as host `name` until SIGTERM or Ctrl-C; says when it has joined.

    Raises:
        SettingsError: a setting cannot be used.
        HandshakeError: the broker refuses this host, or is none.
        PoolError: the devices cannot be used.
    """
    lease.check_heartbeat(settings)
    _check_files(tls.Files.of(settings))
    devices = find_devices(settings.memory) if devices is None else devices
    if len(devices) > wire.MAX_HOST_DEVICES:
        log.warning("offering the first %d of %d devices", wire.MAX_HOST_DEVICES, len(devices))
    asyncio.run(Agent(settings, name, devices[: wire.MAX_HOST_DEVICES], worker_command).run())


def _check_files(files: tls.Files) -> None:
    """Raise SettingsError unless this host's workers can speak TLS where its broker does."""
    if files.ca and not files.cert:
        raise SettingsError(
            "MILLPOND_POOL_TLS_CA is set without MILLPOND_POOL_TLS_CERT: where the broker speaks TLS, this host's "
            "workers do too, and need a certificate. Set MILLPOND_POOL_TLS_CERT and MILLPOND_POOL_TLS_KEY."
        )
    tls.listener(files)


class _Part:
    """A part in a pool, which outlives its connections: the workers that run here for it."""

    def __init__(self, host: OwnHost, session: bytes) -> None:
        self.host = host
        self.session = session
        """By which it comes back to the broker."""
        self.joined = False
        self.wanted: set[int] = set()
        """Workers that are to run; the end of another is no news."""
        self.connection: transport.Connection | None = None
        """Over which the broker knows of this part now."""
        self._ended: deque[wire.WorkerEnded] = deque(maxlen=wire.MAX_HOST_WORKERS)
        """What was said of ends; said again after a break, as nobody knows whether it was heard."""
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, connection: transport.Connection) -> None:
        """Speak with the broker over a connection, and tell it what has become of this part if it knows it."""
        if self.joined:
            for ended in self._ended:
                connection.send(ended)
            connection.send(wire.Running(sorted(self.wanted)))
        self.joined = True
        self.connection = connection

    def start_worker(self, start: wire.StartWorker) -> None:
        """Run a worker."""
        self.wanted.add(start.worker)
        task = asyncio.create_task(self._run_worker(start))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def end_worker(self, number: int) -> None:
        """End a worker."""
        self.wanted.discard(number)
        self.host.end_worker(number)

    async def end(self) -> None:
        """End all workers."""
        for number in list(self.wanted):
            self.end_worker(number)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_S)

    async def _run_worker(self, start: wire.StartWorker) -> None:
        log.info("%s: a worker on %s starts", start.lease, start.device)
        why = "ended for an unknown reason"
        try:
            why = await self.host.run_worker(start, self._send)
        finally:
            if start.worker in self.wanted:
                self.wanted.discard(start.worker)
                log.warning("%s: the worker on %s %s", start.lease, start.device, why)
            self._ended.append(wire.WorkerEnded(start.worker, why[:1000]))
            self._send(self._ended[-1])

    def _send(self, message: wire.Message) -> None:
        if self.connection is not None:
            with contextlib.suppress(ConnectionLost):  # the reader notices as well
                self.connection.send(message)


class Agent:
    """A host of a pool whose broker is elsewhere."""

    def __init__(
        self, settings: PoolSettings, name: str, devices: Sequence[Device], worker_command: Sequence[str]
    ) -> None:
        self.settings = settings
        self.name = name
        self.devices = devices
        self.files = tls.Files.of(settings)
        self.jobs = ray_jobs.Site.of(settings)
        self._worker_command = worker_command
        self._stop = asyncio.Event()
        self._part = self._new_part()
        self._broke: float | None = None
        """Since when the broker that we are with cannot be reached."""

    async def run(self) -> None:
        """Be in the pool, over and over, until SIGTERM or Ctrl-C."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        said = ""
        try:
            while not self._stop.is_set():
                pause_s = RETRY_S
                try:
                    connect_s = transport.REDIAL_S if self._part.joined else transport.GREETING_S
                    with await asyncio.to_thread(
                        lease.connect, self.settings, self.name, connect_s=connect_s
                    ) as connection:
                        await self._take_part(connection)
                except (ConnectionLost, WireError, LeaseError, TimeoutError) as error:
                    if self._may_come_back(error):
                        pause_s = link.RETRY_S
                    else:
                        await self._part.end()
                        self._part, self._broke = self._new_part(), None
                        if str(error) != said:
                            log.warning("not in the pool, trying again every %g s: %s", RETRY_S, error)
                        said = str(error)
                else:
                    said = ""
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), pause_s)
        finally:
            await self._part.end()

    def _new_part(self) -> _Part:
        own = OwnHost(self.name, "", self._worker_command, self.files, self.jobs)
        return _Part(own, secrets.token_bytes(16))

    def _may_come_back(self, error: Exception) -> bool:
        """Return whether the broker may still know of our part: as long as a client's lease would stand."""
        lost = PeerSilent(str(error)) if isinstance(error, TimeoutError) else error
        if not self._part.joined or not isinstance(lost, ConnectionLost):
            return False
        if self._broke is None:
            self._broke = time.monotonic()
            log.warning("the connection to the broker broke: %s; its workers go on meanwhile", error)
        return time.monotonic() - self._broke <= link.patience_s(lost, self.settings.grace_s)

    async def _take_part(self, connection: transport.Connection) -> None:
        """Run workers while the connection stands."""
        offered = [wire.HostDevice(device.name, device.torch_name, device.memory_bytes) for device in self.devices]
        runs_jobs = self.jobs is not None
        connection.send(wire.Join(self.name, offered, self._part.session, self._part.joined, runs_jobs))
        next_beat = 0.0
        heard = time.monotonic()
        try:
            while not self._stop.is_set():
                if (now := time.monotonic()) >= next_beat:
                    next_beat = now + self.settings.heartbeat_s
                    connection.send(wire.Heartbeat())
                if not await asyncio.to_thread(connection.has_input, LOOK_S):
                    silent_s = time.monotonic() - heard
                    if silent_s > max(transport.SILENT_HOST_S, 2 * self.settings.heartbeat_s):
                        raise PeerSilent(f"nothing was heard of the broker for {silent_s:.0f} s")
                    continue
                message, _ = await asyncio.to_thread(connection.receive, lease.ANSWER_S, direction="to-host")
                heard = time.monotonic()
                await self._handle(message, connection)
            connection.send(wire.Leave())  # first: it is the host that leaves, not its workers that fail
        finally:
            self._part.connection = None

    async def _handle(self, message: wire.Message, connection: transport.Connection) -> None:
        part = self._part
        if isinstance(message, wire.Joined):
            await self._join(message, connection)
        elif isinstance(message, wire.Refused):
            raise LeaseError(message.message)
        elif isinstance(message, wire.StartWorker):
            if message.device not in {device.torch_name for device in self.devices} or message.worker in part.wanted:
                raise WireError(f"the broker wants a worker on {message.device!r}, which this host does not offer")
            if message.job and self.jobs is None:
                raise WireError("the broker wants a job, which this host does not run: MILLPOND_POOL_RAY_ADDRESS")
            part.start_worker(message)
        elif isinstance(message, wire.EndWorker):
            part.end_worker(message.worker)
        elif isinstance(message, wire.Introduce):
            part.host.introduce(message)

    async def _join(self, joined: wire.Joined, connection: transport.Connection) -> None:
        if joined.resumed:
            log.warning("back with the broker after %.1f s", time.monotonic() - (self._broke or time.monotonic()))
        else:
            if self._part.joined:  # it has given us up, or is another: the leases of our workers are over
                log.warning("the broker knows nothing of this host any more: its workers end")
                await self._part.end()
                self._part = _Part(self._new_part().host, self._part.session)
            offered = [f"  {device.torch_name}: {device.name}, {gib(device.memory_bytes)}" for device in self.devices]
            print(f"millpond pool: joined {self.settings.address} as {self.name}", *offered, sep="\n", flush=True)  # noqa: T201
        self._broke = None
        self._part.host.bind = connection.socket.getsockname()[0]
        self._part.attach(connection)
