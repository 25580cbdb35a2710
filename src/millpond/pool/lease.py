"""The client's side of a lease: take it from the broker, keep it, give it back.

A lease hangs on its connection, so that it ends with the process that took it, however that ends.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

from millpond.pool import tls, transport, wire
from millpond.pool.errors import ConnectionLost, HandshakeError, LeaseError, PeerSilent, PoolError, WireError
from millpond.pool.link import patience_s
from millpond.settings import PoolSettings, SettingsError

T = TypeVar("T", bound=wire.Message)

ANSWER_S = 10.0
"""How long the broker may take to answer a request."""


def torch_version() -> str:
    """Return the version of the installed torch without loading it.

    Raises:
        PoolError: there is none.
    """
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise PoolError(
            "Both ends of a pool need torch, and it is not installed here. Run: pip install 'millpond[pool]'"
        ) from None


def check_heartbeat(settings: PoolSettings) -> None:
    """Raise SettingsError unless a peer that is well can be told from one that is lost."""
    if not 0 < 2 * settings.heartbeat_s <= settings.grace_s:
        raise SettingsError(
            f"MILLPOND_POOL_HEARTBEAT_S is {settings.heartbeat_s:g} and MILLPOND_POOL_GRACE_S "
            f"{settings.grace_s:g}: the first must be above 0, the second at least twice the first."
        )


def connect(settings: PoolSettings, owner: str, *, connect_s: float = transport.GREETING_S) -> transport.Connection:
    """Return a connection to the broker.

    Raises:
        SettingsError: the address is not host:port, or the files of TLS cannot be used.
        ConnectionLost: no broker answers; the message says what to do.
        HandshakeError: it refused us.
    """
    host, _, port = settings.address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
        raise SettingsError(f"MILLPOND_POOL_ADDRESS is {settings.address!r}, which is not host:port.")
    try:
        connection, _ = transport.connect(
            host.strip("[]"),
            int(port),
            settings.token,
            torch_version(),
            sends="to-broker",
            receives="from-broker",
            name=owner,
            security=tls.caller(settings),
            connect_s=connect_s,
        )
    except ConnectionLost as error:
        raise type(error)(
            f"No pool can be reached: {str(error).rstrip('.')}. "
            "Start one with: millpond pool serve; or set MILLPOND_POOL_ADDRESS to where it listens."
        ) from None
    return connection


def get_status(settings: PoolSettings) -> wire.Status:
    """Return the pool's devices and leases.

    Raises:
        PoolError: it cannot be asked.
    """
    with connect(settings, "status") as connection:
        connection.send(wire.GetStatus())
        return _expect(connection, wire.Status, ANSWER_S)


class Lease:
    """A lease that this process has. It needs care: call `keep` at least every `heartbeat_s`."""

    def __init__(
        self, settings: PoolSettings, owner: str, connection: transport.Connection, granted: wire.Granted
    ) -> None:
        self.granted = granted
        self.connection = connection
        self.settings = settings
        self._owner = owner
        self._lost = ""
        self._next_beat = 0.0
        self._heard = time.monotonic()
        self._broke: tuple[float, ConnectionLost] | None = None
        """Since when the connection is broken, and how it broke."""

    @classmethod
    def acquire(
        cls,
        settings: PoolSettings,
        owner: str,
        *,
        devices: int = 1,
        memory_bytes: int = 0,
        wait_s: float = 0.0,
        job: bool = False,
        on_wait: Callable[[wire.Waiting], None] = lambda waiting: None,
    ) -> Lease:
        """Take a lease on whole devices, or (`memory_bytes` > 0) on a part of each; `on_wait` is told why it waits.

        With `job` it is for a job (`millpond.pool.job`), else for torch.

        Raises:
            LeaseError: it cannot be had at all, or not within `wait_s`.
            PoolError: the broker is gone, or cannot be worked with.
        """
        check_heartbeat(settings)
        connection = connect(settings, owner)
        try:
            connection.send(wire.Acquire(owner, devices, memory_bytes, wait_s, job))
            heard = time.monotonic()
            while True:
                try:
                    message, _ = connection.receive(settings.heartbeat_s)
                except TimeoutError:
                    if time.monotonic() - heard > max(settings.grace_s, ANSWER_S):
                        raise ConnectionLost(f"the broker at {settings.address} does not answer any more") from None
                    connection.send(wire.Heartbeat())
                    continue
                heard = time.monotonic()
                if isinstance(message, wire.Granted):
                    return cls(settings, owner, connection, message)
                if isinstance(message, wire.Waiting):
                    on_wait(message)
                elif isinstance(message, wire.LeaseEnded):
                    raise LeaseError(f"No lease: {message.reason.rstrip('.')}.")
                elif isinstance(message, wire.Refused):
                    raise LeaseError(message.message)
        except BaseException:
            connection.close()
            raise

    def keep(self) -> str:
        """Beat, and take in what the broker says; returns why the lease is lost, or nothing while it stands.

        A broken connection is made anew, until the broker is known to be gone or the grace is over. Then
        `connection` is another one than before.
        """
        if not self._lost:
            self._lost = self._keep()
        return self._lost

    def _keep(self) -> str:
        try:
            if self._broke is not None:
                self._reattach()
            now = time.monotonic()
            if now >= self._next_beat:
                self._next_beat = now + self.settings.heartbeat_s
                self.connection.send(wire.Heartbeat())
            while self.connection.has_input():
                message, _ = self.connection.receive(ANSWER_S)
                self._heard = time.monotonic()
                if isinstance(message, wire.LeaseEnded):
                    return message.reason
                if isinstance(message, wire.Refused):
                    return message.message
            silent_s = time.monotonic() - self._heard
            if silent_s > max(transport.SILENT_HOST_S, 2 * self.settings.heartbeat_s):
                raise PeerSilent(f"it has been silent for {silent_s:.0f} s")
        except (WireError, HandshakeError, SettingsError) as error:  # the files of TLS may have gone meanwhile
            return f"the broker at {self.settings.address} is gone: {error}"
        except (ConnectionLost, TimeoutError) as error:
            return self._note_break(error if isinstance(error, ConnectionLost) else PeerSilent(str(error)))
        return ""

    def _note_break(self, error: ConnectionLost) -> str:
        """Note that the connection is broken; returns why the lease is lost, once it has been for too long."""
        self.connection.close()
        now = time.monotonic()
        if self._broke is None:
            self._broke = now, error
        since, first = self._broke
        if now - since <= patience_s(error, self.settings.grace_s):
            return ""
        gone = f"the broker at {self.settings.address} is gone"
        return f"{gone}: {first}, and for {now - since:.0f} s after that {error}"

    def _reattach(self) -> None:
        """Connect anew and say which lease is ours; what the broker answers is taken in as everything is."""
        self.connection = connect(self.settings, self._owner, connect_s=transport.REDIAL_S)
        self.connection.send(wire.Reattach(self.granted.lease, self.granted.workers[0].token))
        self._broke = None
        self._heard = time.monotonic()
        self._next_beat = 0.0

    def release(self) -> None:
        """Give the lease back, unless it is lost; returns when the broker has taken it, or is gone."""
        with self.connection, contextlib.suppress(ConnectionLost, WireError, LeaseError):
            if not self._lost:
                self.connection.send(wire.Release())
                _expect(self.connection, wire.LeaseEnded, ANSWER_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _expect(connection: transport.Connection, kind: type[T], timeout_s: float) -> T:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            message, _ = connection.receive(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise ConnectionLost(f"the broker did not answer within {timeout_s:g} s") from None
        if isinstance(message, kind):
            return message
        if isinstance(message, wire.Refused):
            raise LeaseError(message.message)
