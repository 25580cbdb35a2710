"""`millpond pool join`: offers this host's devices to a broker elsewhere, and runs the workers that it asks for.

Workers hang on this process, and this process's part in the pool on its connection: when that breaks, the workers are
ended, for their leases are over, and the host joins anew by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Sequence

from millpond.pool import lease, tls, transport, wire
from millpond.pool.errors import ConnectionLost, LeaseError, WireError
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


class Agent:
    """A host of a pool whose broker is elsewhere."""

    def __init__(
        self, settings: PoolSettings, name: str, devices: Sequence[Device], worker_command: Sequence[str]
    ) -> None:
        self.settings = settings
        self.name = name
        self.devices = devices
        self.files = tls.Files.of(settings)
        self._worker_command = worker_command
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Be in the pool, over and over, until SIGTERM or Ctrl-C."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        said = ""
        while not self._stop.is_set():
            try:
                connection = await asyncio.to_thread(lease.connect, self.settings, self.name)
                with connection:
                    await self._take_part(connection)
                    said = ""
            except (ConnectionLost, WireError, LeaseError, TimeoutError) as error:
                if str(error) != said:
                    log.warning("not in the pool, trying again every %g s: %s", RETRY_S, error)
                said = str(error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), RETRY_S)

    async def _take_part(self, connection: transport.Connection) -> None:
        """Run workers while the connection stands."""
        offered = [wire.HostDevice(device.name, device.torch_name, device.memory_bytes) for device in self.devices]
        connection.send(wire.Join(self.name, offered))
        host = OwnHost(self.name, connection.socket.getsockname()[0], self._worker_command, self.files)
        wanted: set[int] = set()
        """Workers that are to run; the end of another is no news."""
        next_beat = 0.0
        heard = time.monotonic()
        try:
            while not self._stop.is_set():
                if (now := time.monotonic()) >= next_beat:
                    next_beat = now + self.settings.heartbeat_s
                    connection.send(wire.Heartbeat())
                if not await asyncio.to_thread(connection.has_input, LOOK_S):
                    if (silent_s := time.monotonic() - heard) > self.settings.grace_s:
                        raise ConnectionLost(f"nothing was heard of the broker for {silent_s:.0f} s")
                    continue
                message, _ = await asyncio.to_thread(connection.receive, lease.ANSWER_S, direction="to-host")
                heard = time.monotonic()
                self._handle(message, connection, host, wanted)
        finally:
            connection.close()  # first: it is the host that leaves, not its workers that fail
            for number in list(wanted):
                wanted.discard(number)
                host.end_worker(number)
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=STOP_S)

    def _handle(self, message: wire.Message, connection: transport.Connection, host: OwnHost, wanted: set[int]) -> None:
        if isinstance(message, wire.Joined):
            offered = [f"  {device.torch_name}: {device.name}, {gib(device.memory_bytes)}" for device in self.devices]
            joined = f"millpond pool: joined {self.settings.address} as {self.name}"
            print(joined, *offered, sep="\n", flush=True)  # noqa: T201
        elif isinstance(message, wire.Refused):
            raise LeaseError(message.message)
        elif isinstance(message, wire.StartWorker):
            if message.device not in {device.torch_name for device in self.devices} or message.worker in wanted:
                raise WireError(f"the broker wants a worker on {message.device!r}, which this host does not offer")
            wanted.add(message.worker)
            task = asyncio.create_task(self._run_worker(message, connection, host, wanted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif isinstance(message, wire.EndWorker):
            wanted.discard(message.worker)
            host.end_worker(message.worker)
        elif isinstance(message, wire.Introduce):
            host.introduce(message)

    async def _run_worker(
        self, start: wire.StartWorker, connection: transport.Connection, host: OwnHost, wanted: set[int]
    ) -> None:
        log.info("%s: a worker on %s starts", start.lease, start.device)

        def report(said: wire.WorkerReport) -> None:
            with contextlib.suppress(ConnectionLost):  # the reader notices as well
                connection.send(said)

        why = "ended for an unknown reason"
        try:
            why = await host.run_worker(start, report)
        finally:
            if start.worker in wanted:
                wanted.discard(start.worker)
                log.warning("%s: the worker on %s %s", start.lease, start.device, why)
            with contextlib.suppress(ConnectionLost):
                connection.send(wire.WorkerEnded(start.worker, why[:1000]))
