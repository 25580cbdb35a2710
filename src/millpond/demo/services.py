"""Pool, hub and edge as processes of their own on this machine: started, waited for, killed, started again.

They are the very programs that an operator starts, with settings in the environment and tokens in files.
"""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import msgspec
import psutil

from millpond import MillpondError
from millpond.process import die_with_parent
from millpond.registry import generate_key_pair

MILLPOND = [sys.executable, "-m", "millpond"]
KEPT_FILE = "kept.json"
STOP_S = 15.0
"""How long a service may take to end after SIGTERM before it is killed."""


class ServiceFailed(MillpondError):
    """A service ended, or did not answer in time; the message names its log and shows the log's end."""


class Service:
    """One Millpond program as a process with its own log."""

    def __init__(
        self,
        name: str,
        command: list[str],
        environ: Mapping[str, str],
        log: Path,
        ready: Callable[[], bool],
        *,
        outlives_us: bool = False,
    ):
        self.name = name
        self.log = log
        self._command = command
        self._environ = dict(environ)
        self._ready = ready
        self._outlives_us = outlives_us
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Return the process's id while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start the process; does not wait until it answers."""
        parent = os.getpid()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop our services in order
                preexec_fn=None if self._outlives_us else lambda: die_with_parent(parent),
            )

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until the service answers.

        Raises:
            ServiceFailed: it ended, or did not answer within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while not self._ready():
            if self.pid is None:
                raise ServiceFailed(f"millpond {self.name} ended as it started. {self._tail()}")
            if time.monotonic() > deadline:
                raise ServiceFailed(f"millpond {self.name} did not answer within {timeout_s:.0f} s. {self._tail()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End the process: SIGTERM, and SIGKILL where that is not enough."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None

    def kill(self) -> None:
        """End the process as a power cut would: SIGKILL, no farewell."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(STOP_S)

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-15:] if self.log.exists() else []
        return f"The end of its log, {self.log}:\n" + "\n".join(f"  {line}" for line in lines)


class Site:
    """A training site (pool, registry, hub) and an edge site below one directory, on loopback.

    The two sites have homes of their own; the edge has of the training site only its URL, a token and the public
    key. Use as a context manager: leaving it stops all services,
    unless `keep`: then they outlive this process, and `stop_kept` ends them.
    """

    def __init__(self, home: Path, *, recipe: Path, retrain_after: int, keep: bool = False):
        self.home = home
        self.keep = keep
        self.training_home = home / "training-site"
        self.edge_home = home / "edge-site"
        self.logs = home / "logs"
        for directory in (self.training_home, self.edge_home / "keys", self.logs):
            directory.mkdir(parents=True, exist_ok=True)
        self.tokens = {role: self._token(role) for role in ("pool", "edge", "reviewer", "operator")}
        self.pool_port, self.hub_port, self.edge_port = _free_ports(3)
        self.hub_url = f"http://127.0.0.1:{self.hub_port}"
        self.edge_url = f"http://127.0.0.1:{self.edge_port}"
        keys = self.training_home / "keys"
        if not (keys / "signing.key").exists():
            generate_key_pair(keys / "signing.key", keys / "signing.pub")
        (self.edge_home / "keys/signing.pub").write_bytes((keys / "signing.pub").read_bytes())

        base = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
        base |= {"PYTHONUNBUFFERED": "1"}
        training = base | {
            "MILLPOND_HOME": str(self.training_home),
            "MILLPOND_POOL_PORT": str(self.pool_port),
            "MILLPOND_POOL_ADDRESS": f"127.0.0.1:{self.pool_port}",
            "MILLPOND_POOL_TOKEN_FILE": str(self._token_file("pool")),
        }
        if data := os.environ.get("MILLPOND_DATA"):
            training["MILLPOND_DATA"] = data
        hub = training | {
            "MILLPOND_HUB_PORT": str(self.hub_port),
            "MILLPOND_HUB_RECIPE": str(recipe),
            "MILLPOND_HUB_RETRAIN_AFTER": str(retrain_after),
            "MILLPOND_HUB_TRAIN_COMMAND": shlex.join([*MILLPOND, "pool", "run", "--", *MILLPOND, "learn", "job"]),
            "MILLPOND_HUB_EDGE_TOKEN_FILE": str(self._token_file("edge")),
            "MILLPOND_HUB_REVIEWER_TOKEN_FILE": str(self._token_file("reviewer")),
            "MILLPOND_HUB_OPERATOR_TOKEN_FILE": str(self._token_file("operator")),
        }
        edge = base | {
            "MILLPOND_HOME": str(self.edge_home),
            "MILLPOND_EDGE_NAME": "edge-1",
            "MILLPOND_EDGE_PORT": str(self.edge_port),
            "MILLPOND_EDGE_HUB": self.hub_url,
            "MILLPOND_EDGE_HUB_TOKEN_FILE": str(self._token_file("edge")),
            "MILLPOND_EDGE_SYNC_S": "0.5",
        }
        self.pool = self._service("pool", training, lambda: _accepts(self.pool_port))
        self.hub = self._service("hub", hub, lambda: _answers(f"{self.hub_url}/healthz"))
        self.edge = self._service("edge", edge, lambda: _answers(f"{self.edge_url}/healthz"))
        self.services = [self.pool, self.hub, self.edge]

    def __enter__(self) -> Self:
        for service in self.services:
            service.start()
        try:
            for service in self.services:
                service.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.keep and error is None:
            pids = {service.name: service.pid for service in self.services if service.pid}
            started = {name: psutil.Process(pid).create_time() for name, pid in pids.items()}
            kept = [Kept(name=name, pid=pid, started=started[name]) for name, pid in pids.items()]
            (self.home / KEPT_FILE).write_bytes(msgspec.json.encode(kept))
        else:
            self.stop()

    def stop(self) -> None:
        """Stop all services, the one that others need last."""
        for service in reversed(self.services):
            service.stop()

    def token_file(self, role: str) -> Path:
        """Return the file, readable by its owner alone, that holds a role's token."""
        return self._token_file(role)

    def _service(self, name: str, environ: Mapping[str, str], ready: Callable[[], bool]) -> Service:
        command = [*MILLPOND, name, "serve"]
        return Service(name, command, environ, self.logs / f"{name}.log", ready, outlives_us=self.keep)

    def _token_file(self, role: str) -> Path:
        return self.home / "tokens" / role

    def _token(self, role: str) -> str:
        path = self._token_file(role)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_urlsafe(24))
        return path.read_text()


class Kept(msgspec.Struct, frozen=True):
    """A service that was left up: its start time tells it from a later process with the same id."""

    name: str
    pid: int
    started: float


def stop_kept(home: Path) -> list[str]:
    """Stop the services that a demo left up below `home`; return the names of those that were running.

    Raises:
        ServiceFailed: no demo left services there.
    """
    try:
        kept = msgspec.json.decode((home / KEPT_FILE).read_bytes(), type=list[Kept])
    except (OSError, msgspec.MsgspecError):
        raise ServiceFailed(f"No demo left services up in {home}: it holds no readable {KEPT_FILE}.") from None
    stopped = []
    for service in reversed(kept):
        try:
            process = psutil.Process(service.pid)
            if abs(process.create_time() - service.started) > 1.0:
                continue
            process.terminate()
            try:
                process.wait(STOP_S)
            except psutil.TimeoutExpired:
                process.kill()
        except psutil.NoSuchProcess:
            continue
        stopped.append(service.name)
    (home / KEPT_FILE).unlink()
    return stopped


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0).status_code == 200
    except httpx.TransportError:
        return False
