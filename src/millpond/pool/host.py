"""A host's worker processes: started, followed, ended. The same beside the broker and on a host that has joined it.

A worker is given its orders by stdin and reports by stdout; it hangs on this process, whatever ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from millpond import confine
from millpond.pool import ray_jobs, tls, wire
from millpond.pool.worker import Introduction, Orders, Report
from millpond.pool.worker_log import WorkerLog

START_S = 120.0
"""How long a worker may take to start: it loads torch, and makes a context on its device."""
SILENT_WORKER_S = 60.0
"""A worker reports every second; one that has not for so long is taken for dead."""
EXIT_S = 2.0
"""How long a worker that reports no more may take to end by itself."""
MAX_REPORT_BYTES = 4096
WORKER_COMMAND = (sys.executable, "-m", "millpond.pool.worker")
OnReport = Callable[[wire.WorkerReport], None]


class Host(Protocol):
    """A machine that runs workers, as the broker knows it: its own, or one that has joined."""

    name: str
    address: str
    """Where its workers are reached; empty: where the broker is."""

    async def run_worker(self, start: wire.StartWorker, on_report: OnReport) -> str:
        """Run a worker to its end; return why it ended, as said of it ("was ended by SIGKILL")."""
        ...

    def introduce(self, introduce: wire.Introduce) -> None:
        """Tell a worker who its peers are."""
        ...

    def end_worker(self, number: int) -> None:
        """Have a worker end at once."""
        ...


class _Running:
    """A worker process."""

    def __init__(self) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self.unwanted = self.introduced = False

    def kill(self) -> None:
        """End the process, and what it has started; or see to it that it ends as soon as it is there."""
        self.unwanted = True
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


class OwnHost:
    """The machine that we are on. `command` starts a worker, which listens on `bind` and shows the certificate."""

    address = ""

    def __init__(
        self,
        name: str,
        bind: str,
        command: Sequence[str],
        files: tls.Files,
        jobs: ray_jobs.Site | None = None,
    ) -> None:
        self.name = name
        self.bind = bind
        self.files = files
        self.jobs = jobs
        """What it has for jobs; None: it runs none."""
        self._command = command
        self._running: dict[int, _Running] = {}

    async def run_worker(self, start: wire.StartWorker, on_report: OnReport) -> str:
        """Run a worker to its end, and that of its job; return why it ended."""
        running = self._running[start.worker] = _Running()
        try:
            if not start.job:
                return await self._run(running, start, on_report)
            if self.jobs is None:
                return "cannot run jobs: MILLPOND_POOL_RAY_ADDRESS is not set on its host"
            with self.jobs.place() as job:
                try:
                    return await self._run(running, start, on_report, job)
                finally:
                    await asyncio.to_thread(ray_jobs.RayJobs(self.jobs).end, ray_jobs.name_of(start.lease))
        except OSError as error:
            return f"could not be started: {error}"
        finally:
            del self._running[start.worker]

    async def _run(
        self, running: _Running, start: wire.StartWorker, on_report: OnReport, job: ray_jobs.Site | None = None
    ) -> str:
        try:
            running.process = process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=confine.environment(os.environ),
                start_new_session=True,  # a Ctrl-C in our terminal is for us to act on
                limit=MAX_REPORT_BYTES,
            )
            log = WorkerLog(start.lease)
            copying = asyncio.create_task(_copy_errors(process, log))
            fault = "" if running.unwanted else await self._follow(start, process, on_report, job)
            if not fault and not running.unwanted:
                # It says nothing more, so it is about to end, and why shows in its own exit code.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), EXIT_S)
            running.kill()
            code = await process.wait()
            await asyncio.wait([copying], timeout=1.0)
            copying.cancel()
            return fault or _ending(code, log)
        finally:
            running.kill()

    def introduce(self, introduce: wire.Introduce) -> None:
        """Tell a worker who its peers are, once: a broker that cannot know whether it was heard says it again."""
        running = self._running.get(introduce.worker)
        if running is None or running.introduced:
            return
        if running.process is not None and running.process.stdin is not None:
            running.introduced = True
            introduction = Introduction(introduce.own, introduce.peers)
            running.process.stdin.write(msgspec.json.encode(introduction) + b"\n")

    def end_worker(self, number: int) -> None:
        """Have a worker end at once."""
        if number in self._running:
            self._running[number].kill()

    async def _follow(
        self,
        start: wire.StartWorker,
        process: asyncio.subprocess.Process,
        on_report: OnReport,
        job: ray_jobs.Site | None,
    ) -> str:
        """Give a worker its orders and take in its reports; returns what is wrong with it if it is still there."""
        assert process.stdin is not None
        assert process.stdout is not None
        orders = Orders(
            start.lease,
            start.token,
            self.bind,
            start.device,
            start.memory_bytes,
            os.getpid(),
            start.grace_s,
            start.peer_token,
            self.files.for_workers(start.asks_certificate),
            job,
        )
        process.stdin.write(msgspec.json.encode(orders) + b"\n")
        limit_s = START_S
        while True:
            try:
                line = await asyncio.wait_for(process.stdout.readline(), limit_s)
                if not line:
                    return ""
                report = msgspec.json.decode(line, type=Report)
            except TimeoutError:
                return f"gave no sign of life for {limit_s:g} s"
            except (ValueError, OSError) as error:
                return f"sent a report that cannot be read: {error}"
            on_report(
                wire.WorkerReport(
                    start.worker,
                    process.pid,
                    report.port,
                    report.peer_port,
                    report.used_bytes,
                    report.idle_s,
                    report.certificate,
                )
            )
            limit_s = SILENT_WORKER_S


async def _copy_errors(process: asyncio.subprocess.Process, log: WorkerLog) -> None:
    """Pass on what a worker writes to stderr, within bounds."""
    assert process.stderr is not None
    while chunk := await process.stderr.read(4096):
        sys.stderr.write(log.add(chunk, time.monotonic()))
    sys.stderr.write(log.rest())


def _ending(code: int, log: WorkerLog) -> str:
    if code < 0:
        # SIGKILL that we did not send: a person, or the kernel when the host's memory runs out.
        return f"was ended by {signal.Signals(-code).name}"
    last = log.last_line()
    return f"ended with exit code {code}" + (f": {last[:500]}" if last else "")
