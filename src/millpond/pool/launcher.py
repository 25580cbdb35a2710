"""`millpond pool run`: a command that runs while a lease lasts, and not much longer.

The lease is given back however the command ends; when the lease is lost, the command may end by itself with the
error that its next op raises, and is ended if it does not. Whatever ends the launcher ends the command.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil

from millpond.pool import attach, tls
from millpond.pool.errors import PoolError
from millpond.pool.lease import Lease
from millpond.process import die_with_parent

GRACE_S = 3.0
"""How long a command may go on after its lease is lost; after ten seconds nothing may be left."""
TERMINATE_S = 1.0
"""How long it then may take to end on SIGTERM, before SIGKILL."""
POLL_S = 0.5
LOST_EXIT = 1
"""Exit code when the lease was lost and the command ended well all the same."""


class CommandUnusable(PoolError):
    """A command cannot be started; `exit_code` is a shell's for the same mishap."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def owner() -> str:
    """Return how this process is called in the pool's records."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}:{os.getpid()}"[:128]


def check_command(command: Sequence[str]) -> None:
    """Raise CommandUnusable unless the command's program is there and may be executed."""
    program = command[0]
    if shutil.which(program) is None:
        if os.sep in program and os.path.isfile(program):  # noqa: PTH113
            raise CommandUnusable(f"{program} may not be executed: make it executable, or name its interpreter.", 126)
        raise CommandUnusable(f"{program} is not a command here: check its name, the PATH and the directory.", 127)


def run(command: Sequence[str], lease: Lease) -> int:
    """Run a command under a lease; returns its exit code, 128 + n if signal n ended it. Call it in the main thread.

    Raises:
        CommandUnusable: it could not be started.
    """
    with tempfile.TemporaryDirectory(prefix="millpond-") as directory:
        return _run(command, lease, Path(directory) / "ended")


def _run(command: Sequence[str], lease: Lease, says_ended: Path) -> int:
    launcher = os.getpid()
    granted = lease.granted
    environment = attach.environment(granted.lease, granted.workers, says_ended)
    environment |= tls.Files.of(lease.settings).environment()
    try:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            preexec_fn=lambda: die_with_parent(launcher),  # safe: this process has no other thread
        )
    except OSError as error:
        code = 126 if isinstance(error, PermissionError) else 127
        raise CommandUnusable(f"{command[0]} cannot be started: {error.strerror}.", code) from error
    ended = os.pidfd_open(process.pid)
    try:
        with _forward_signals(process):
            lost = _watch(process, lease, ended)
            if lost:
                (whole := says_ended.with_suffix(".new")).write_text(lost)
                whole.rename(says_ended)  # the command sees all of it, or nothing
                workers = ", ".join(f"worker {w.pid} at {w.host}:{w.port}" for w in granted.workers)
                sys.stderr.write(f"millpond pool: {granted.lease} ({workers}) is lost: {lost}\n")
                sys.stderr.flush()
                _end(process, ended)
            code = process.wait()
    finally:
        os.close(ended)
        if process.poll() is None:
            process.kill()
            process.wait()
    code = 128 - code if code < 0 else code
    return code or (LOST_EXIT if lost else 0)


def _watch(process: subprocess.Popen[bytes], lease: Lease, ended: int) -> str:
    """Keep the lease until the command ends; returns why the lease was lost, or nothing."""
    while True:
        if lost := lease.keep():
            return lost
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        if lease.connection.is_open:  # else it is made anew after a pause
            poll.register(lease.connection.socket, select.POLLIN)
        poll.poll(POLL_S * 1000)
        if process.poll() is not None:
            return ""


def _end(process: subprocess.Popen[bytes], ended: int) -> None:
    """Wait for the command to end by itself, then end it and all that it started."""
    for limit_s, number in ((GRACE_S, signal.SIGTERM), (TERMINATE_S, signal.SIGKILL)):
        if select.select([ended], [], [], limit_s)[0]:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            command = psutil.Process(process.pid)
            for each in [*command.children(recursive=True), command]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(number)


@contextlib.contextmanager
def _forward_signals(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass on to the command what asks us to end; we end when it has."""

    def forward(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT or not _in_foreground():  # else the terminal has sent it to the command as well
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def outlives_parent() -> bool:
    """Return whether this process was started to go on after its parent, as nohup(1) does."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
