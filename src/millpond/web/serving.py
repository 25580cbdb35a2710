"""`serve`: gunicorn with the shape every Millpond service has.

One master, `workers` web processes with `threads` threads each, and beside them companions (such as the edge's
sync), started again when they end. Whatever ends the master, SIGKILL included, ends them all; the port is free at
once. SIGTERM and Ctrl-C finish running requests, within `STOP_S`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flask
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer

from millpond import MillpondError
from millpond.process import die_with_parent
from millpond.settings import check_exposure
from millpond.web.worker import PatientWorker

STOP_S = 5
"""How long running requests and companions may take to end."""
REQUEST_S = 120
"""A worker whose loop does not turn for this long is killed and replaced."""
RESTART_S = 1.0
"""Least time between two starts of a companion."""
STALL_S = 10
"""A caller that sends, or takes, nothing for this long in the middle of a request loses its connection."""
BACKLOG = 512
MAX_FILES = 8192
"""File descriptors of a worker; half of them may be connections that have not sent a request yet."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD)


class ServeError(MillpondError):
    """The service cannot start."""


def serve(
    app_factory: Callable[[], flask.Flask],
    *,
    program: str,
    bind: str,
    port: int,
    tokens: Mapping[str, str],
    workers: int,
    threads: int,
    metrics_dir: Path,
    companions: Mapping[str, Callable[[], None]] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; prints one line when the port is open.

    `app_factory` runs in each worker. `tokens` (variable suffix → value) must all be set to bind beyond loopback.
    `companions` run in processes of their own; they end on SIGTERM.

    Raises:
        SettingsError: bound beyond loopback without a token.
        ServeError: the port is taken, the address is not this machine's, or no worker could start.
    """
    check_exposure(program, bind, **tokens)
    listener = _listen(program, bind, port)
    shutil.rmtree(metrics_dir, ignore_errors=True)
    metrics_dir.mkdir(parents=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics_dir)
    shown = f"[{bind}]" if ":" in bind else bind
    url = f"http://{shown}:{listener.getsockname()[1]}"
    application = _Application(program, url, listener.detach(), app_factory, workers, threads, dict(companions or {}))
    master = os.getpid()
    try:
        application.run()
    except HaltServer as error:  # raised anew where gunicorn was stopping already
        raise _no_worker(program) from error
    except SystemExit as stop:
        if os.getpid() != master:  # a worker is done: nothing of the master's stack above us is its to run
            sys.stderr.flush()
            os._exit(stop.code if isinstance(stop.code, int) else 1)
        if stop.code in (Arbiter.WORKER_BOOT_ERROR, Arbiter.APP_LOAD_ERROR):
            raise _no_worker(program) from None
        if stop.code:
            raise


def _listen(program: str, bind: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((bind, port), family=family, backlog=BACKLOG)
    except OSError as error:
        why, next = str(error), f"set MILLPOND_{program.upper()}_BIND and MILLPOND_{program.upper()}_PORT"
        if error.errno == errno.EADDRINUSE:
            why = "another process listens there"
            next = f"stop it (`ss -ltnp 'sport = :{port}'` shows it), or set MILLPOND_{program.upper()}_PORT"
        raise ServeError(
            f"millpond {program} cannot listen on {bind}, port {port}: {why}. To go on, {next}."
        ) from error
    # Linux hands these down to accepted connections; gunicorn itself would let a stalled caller keep a thread.
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        listener.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", STALL_S, 0))
    return listener


def _connections(threads: int) -> int:
    """Return how many connections a worker may hold: what its file descriptors allow, which are raised here."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MAX_FILES if most == resource.RLIM_INFINITY else min(most, MAX_FILES)
    if now != resource.RLIM_INFINITY and now < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    return max(threads + 10, files // 2)


def _no_worker(program: str) -> ServeError:
    return ServeError(f"millpond {program}: no worker could start; the lines above say why.")


class _Application(BaseApplication):  # type: ignore[misc]
    def __init__(
        self,
        program: str,
        url: str,
        listener: int,
        app_factory: Callable[[], flask.Flask],
        workers: int,
        threads: int,
        companions: dict[str, Callable[[], None]],
    ):
        self._settings = {
            "bind": f"fd://{listener}",
            "workers": workers,
            "worker_class": PatientWorker,
            "worker_connections": _connections(threads),
            "threads": threads,
            "backlog": BACKLOG,
            "timeout": REQUEST_S,
            "graceful_timeout": STOP_S,
            "keepalive": 15,
            "proc_name": f"millpond {program}",
            "accesslog": None,
            "loglevel": "warning",
            "control_socket_disable": True,
            "post_fork": self._post_fork,
            "post_worker_init": self._post_worker_init,
        }
        self._line = f"millpond {program}: listening on {url}"
        self._app_factory = app_factory
        self.companions = {name: _Companion(name, run) for name, run in companions.items()}
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._settings.items():
            self.cfg.set(name, value)

    def load(self) -> flask.Flask:
        return self._app_factory()

    def run(self) -> None:
        _Arbiter(self).run()

    def _post_fork(self, arbiter: Any, worker: Any) -> None:
        die_with_parent(arbiter.pid)

    def _post_worker_init(self, worker: Any) -> None:
        if worker.age == 1:  # the first worker ever has loaded its application: now there are answers
            print(self._line, flush=True)  # noqa: T201


class _Arbiter(Arbiter):  # type: ignore[misc]
    """Gunicorn's master, which also keeps the companions running; its loop turns at least once a second."""

    def manage_workers(self) -> None:
        for companion in self.app.companions.values():  # first: who reads that we listen finds them all there
            companion.keep(self.LISTENERS, self.log)
        super().manage_workers()

    def stop(self, graceful: bool = True) -> None:
        companions = list(self.app.companions.values())
        for companion in companions:
            companion.signal(signal.SIGTERM)
        super().stop(graceful)
        deadline = time.monotonic() + STOP_S
        for companion in companions:
            if not companion.wait(max(0.0, deadline - time.monotonic())):
                companion.signal(signal.SIGKILL)

    def handle_hup(self) -> None:
        """End when the terminal goes away; gunicorn would load its settings anew, of which there are none."""
        self.handle_term()


class _Companion:
    """One process beside the web workers. It is known by a pidfd: its pid is reaped by gunicorn, and may be reused."""

    def __init__(self, name: str, run: Callable[[], None]):
        self.name = name
        self._run = run
        self._pidfd: int | None = None
        self._started = 0.0

    def keep(self, listeners: Sequence[Any], log: Any) -> None:
        if not self.wait(0):
            return
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
            log.error("%s ended; starting it again", self.name)
        if time.monotonic() - self._started < RESTART_S:
            return
        self._started = time.monotonic()
        master = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # one that came before the child's own handling were lost
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            self._pidfd = os.pidfd_open(pid)
            return
        status = 1
        try:
            die_with_parent(master)
            for listener in listeners:
                listener.sock.close()
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the master tells us
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            self._run()
            status = 0
        except BaseException:
            logging.getLogger(__name__).exception("%s failed", self.name)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def wait(self, timeout_s: float) -> bool:
        """Return whether the process has ended (or never started), waiting up to `timeout_s`."""
        return self._pidfd is None or bool(select.select([self._pidfd], [], [], timeout_s)[0])

    def signal(self, number: signal.Signals) -> None:
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
