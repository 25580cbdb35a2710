"""The jobs of this host: what it has for them, and Ray's job server, which runs them.

It is spoken to by its documented HTTP interface. Ray's own client for that has no limits on its waits, takes another
address from the environment, and imports a module that an address may name.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from millpond.pool.errors import PoolError
from millpond.settings import PoolSettings, SettingsError

ANSWER_S = 10.0
"""How long Ray may take to answer."""
END_S = 15.0
"""How long a job may take to end once it is to: Ray asks it to, and kills it three seconds later."""
LOOK_S = 0.25
MAX_ANSWER_BYTES = 4 * 1024 * 1024
TAIL_CHARACTERS = 600
"""How much of what a job has printed last is told."""
ENDED = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})
NO_SUCH_JOB = "NONE"
MARKS_OF_RAY = ("Running entrypoint for job", " job_manager.py:")
"""In what Ray itself writes into a job's log."""

log = logging.getLogger("millpond.pool")


class RayError(PoolError):
    """Ray cannot be reached, or does not do what it is asked."""


class Site(msgspec.Struct, frozen=True):
    """What a host has for its jobs."""

    address: str
    """URL of Ray's job server."""
    token: str
    python: str
    """Which has Paddle."""
    most_bytes: int
    """Of one job's files."""
    directory: str
    """Where jobs have their directories."""
    work: str = ""
    """That of one job."""

    @classmethod
    def of(cls, settings: PoolSettings) -> Site | None:
        """Return what the settings name; None: this host runs no jobs.

        Raises:
            SettingsError: the address is no URL.
        """
        if not settings.ray_address:
            return None
        url = urllib.parse.urlsplit(settings.ray_address)
        if url.scheme not in ("http", "https") or not url.hostname or url.path.strip("/"):
            raise SettingsError(
                f"MILLPOND_POOL_RAY_ADDRESS is {settings.ray_address!r}, which is not the URL of Ray's job server. "
                "Write one such as http://127.0.0.1:8265."
            )
        python = str(settings.paddle_python or sys.executable)
        directory = str(settings.home.absolute() / "pool/jobs")
        return cls(settings.ray_address.rstrip("/"), settings.ray_token, python, settings.job_bytes, directory)

    @contextlib.contextmanager
    def place(self) -> Iterator[Site]:
        """Make a directory for a job (`work`), which is gone afterwards; those that a kill -9 has left are deleted.

        Raises:
            OSError: it cannot be made.
        """
        directory = Path(self.directory)
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob("job-*"):
            with contextlib.suppress(OSError), _held(left):
                shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix="job-", dir=directory))
        try:
            with _held(work):
                yield msgspec.structs.replace(self, work=str(work))
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Hold a directory's lock, which ends with this process.

    Raises:
        BlockingIOError: another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


class RayJobs:
    """Ray's job server."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def node_here(self) -> str:
        """Return the address of Ray's node on this host.

        Raises:
            RayError: it has none, or does not answer.
        """
        found = self._ask("GET", "/api/v0/nodes?filter_keys=state&filter_predicates=%3D&filter_values=ALIVE")
        try:
            nodes = [str(node["node_ip"]) for node in found["data"]["result"]["result"] if node["state"] == "ALIVE"]
        except (KeyError, TypeError) as error:
            raise RayError(f"Ray's job server at {self.site.address} does not tell its nodes: {error}") from None
        ours = {address.address.partition("%")[0] for each in psutil.net_if_addrs().values() for address in each}
        here = next((node for node in nodes if node in ours), None)
        if here is None:
            shown = ", ".join(nodes[:10]) or "none"
            raise RayError(f"Ray has no node on this host (its nodes are {shown}). Start one here: ray start.")
        return here

    def submit(self, job: str, command: str, node: str) -> None:
        """Have a shell's command run on a node, as a job of this name.

        Raises:
            RayError: it cannot be.
        """
        wanted = {"submission_id": job, "entrypoint": command, "entrypoint_resources": {f"node:{node}": 0.001}}
        self._ask("POST", "/api/jobs/", wanted)

    def status(self, job: str) -> str:
        """Return how a job is: PENDING, RUNNING, one of `ENDED`, or `NO_SUCH_JOB`.

        Raises:
            RayError: it does not answer.
        """
        return str(self._look_at(job).get("status"))

    def why_ended(self, job: str) -> str:
        """Return why a job has ended, and what it printed last; nothing if it has not.

        What Ray says of it would show the client the host's paths and variables.

        Raises:
            RayError: it does not answer.
        """
        found = self._look_at(job)
        status, code = found.get("status"), found.get("driver_exit_code")
        if status not in {*ENDED, NO_SUCH_JOB}:
            return ""
        printed = self._printed(job)
        said = f". It printed last: {printed}" if printed else ""
        if code == -signal.SIGKILL:
            return f"the job was killed by SIGKILL (memory may have run out; a smaller --batch-size needs less){said}"
        if isinstance(code, int):
            return f"the job ended with exit status {code}{said}"
        reasons = {"STOPPED": "was stopped in Ray", NO_SUCH_JOB: "is not known to Ray (any more)"}
        return f"the job {reasons.get(str(status), 'failed in Ray, whose dashboard says why')}{said}"

    def _look_at(self, job: str) -> dict[str, Any]:
        found = self._ask("GET", f"/api/jobs/{_quoted(job)}", missing={"status": NO_SUCH_JOB})
        return found if isinstance(found, dict) else {}

    def _printed(self, job: str) -> str:
        """Return the last of what a job has printed; nothing if that cannot be had."""
        with contextlib.suppress(RayError, AttributeError):
            found = self._ask("GET", f"/api/jobs/{_quoted(job)}/logs", missing={})
            lines = str(found.get("logs") or "").splitlines()
            own = [line for line in lines if not any(mark in line for mark in MARKS_OF_RAY)]
            return "\n".join(own).strip()[-TAIL_CHARACTERS:]
        return ""

    def end(self, job: str) -> None:
        """End a job, and wait until it has; what hinders that is logged."""
        deadline = time.monotonic() + END_S
        try:
            while self.status(job) not in {*ENDED, NO_SUCH_JOB}:
                if time.monotonic() > deadline:
                    raise RayError(f"Ray has not ended it within {END_S:g} s")
                self._ask("POST", f"/api/jobs/{_quoted(job)}/stop", missing={})
                time.sleep(LOOK_S)
        except RayError as error:  # the job itself ends when its worker has
            log.warning("%s: %s", job, error)

    def _ask(self, method: str, path: str, body: object = None, *, missing: dict[str, Any] | None = None) -> Any:
        """Return Ray's answer, `missing` if it knows no such thing."""
        url = urllib.parse.urlsplit(self.site.address)
        secure = url.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        headers = {"Authorization": f"Bearer {self.site.token}"} if self.site.token else {}
        data = None if body is None else json.dumps(body).encode()
        connection = kind(url.hostname or "", url.port or (443 if secure else 80), timeout=ANSWER_S)
        try:
            connection.request(method, path, data, headers | ({"Content-Type": "application/json"} if data else {}))
            answer = connection.getresponse()
            content = answer.read(MAX_ANSWER_BYTES)
            if answer.status == 404 and missing is not None:
                return missing
            if answer.status in (401, 403):
                raise RayError(
                    f"Ray's job server at {self.site.address} refuses the token. Set MILLPOND_POOL_RAY_TOKEN to the "
                    "RAY_AUTH_TOKEN that Ray was started with."
                )
            if answer.status != 200:
                said = content.decode(errors="replace").strip()[-300:]
                raise RayError(f"Ray's job server at {self.site.address} answers {answer.status}: {said}")
            return json.loads(content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise RayError(
                f"Ray's job server at {self.site.address} does not answer ({error or type(error).__name__}). Start Ray "
                "on that host, with its dashboard: pip install 'ray[default]', ray start --head."
            ) from None
        finally:
            connection.close()


def name_of(lease: str) -> str:
    """Return what Ray calls the job of a lease."""
    return f"millpond-{lease}"


def _quoted(job: str) -> str:
    return urllib.parse.quote(job, safe="")
