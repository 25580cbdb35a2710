"""For tests of jobs: Ray as a host of the pool has it, real or a stand-in for its job server; a stand-in for Paddle.

The stand-in keeps what `millpond.pool.ray_jobs` needs of Ray's documented interface; the same tests run on both.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from millpond.learn.keeper import descendants, end
from millpond.process import die_with_parent

RAY_TOKEN = "0123456789abcdef" * 4
START_S = 90.0

PADDLE = """#!{python}
# Stands in for a Python with Paddle: `-P -m millpond.learn.paddle WORK SOCKET`. What it does, job.json says.
import json, os, socket, sys, time
from pathlib import Path
assert sys.argv[1:4] == ["-P", "-m", "millpond.learn.paddle"], sys.argv
work = Path(sys.argv[4])
line = socket.socket(socket.AF_UNIX)
os.chdir(work)
line.connect(sys.argv[5])
(work.parent.parent / "job.pid").write_text(str(os.getpid()))
what = json.loads((work / "job.json").read_bytes())
if "says" in what:
    line.sendall(what["says"].encode())
if what.get("tells_environment"):
    line.sendall(json.dumps(dict(os.environ)).encode() + b"\\n")
if what.get("tells_files"):
    line.sendall(json.dumps({{f.name: f.stat().st_size for f in work.iterdir() if f.is_file()}}).encode() + b"\\n")
if what.get("floods"):
    while True:
        line.sendall(b"x" * 65536)
for name, size in what.get("writes", {{}}).items():
    (work / name).write_bytes(b"w" * size)
    line.sendall(b"wrote\\n")
if "exits" in what:
    print("disc on fire", file=sys.stderr)
    sys.exit(what["exits"])
while said := line.recv(64):
    line.sendall(b"heard " + said)
"""


def paddle_stand_in(directory: Path) -> Path:
    """Write the stand-in for a Python with Paddle."""
    path = directory / "paddle-python"
    path.write_text(PADDLE.format(python=sys.executable))
    path.chmod(0o755)
    return path


class RayStandIn:
    """What of Ray's job server a host needs; jobs are processes of this one."""

    def __init__(self, token: str = RAY_TOKEN) -> None:
        self.nodes = ["192.0.2.9", "127.0.0.1"]
        self.submitted: list[dict[str, Any]] = []
        self._jobs: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
        self._stopped: set[str] = set()
        self._directory = Path(tempfile.mkdtemp(prefix="ray-"))
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one(self) -> None:
                if self.headers.get("Authorization") != f"Bearer {token}":
                    return self.reply(401, "Unauthorized: Missing authentication token")
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, answer = stand_in.answer(self.command, self.path.partition("?")[0], body)
                self.reply(status, answer)

            do_GET = do_POST = handle_one

            def reply(self, status: int, answer: object) -> None:
                content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        match method, path.strip("/").split("/"):
            case "GET", ["api", "v0", "nodes"]:
                nodes = [{"node_ip": node, "state": "ALIVE"} for node in self.nodes]
                return 200, {"result": True, "data": {"result": {"result": nodes}}}
            case "POST", ["api", "jobs"]:
                wanted = json.loads(body)
                self.submitted.append(wanted)
                log = self._directory / wanted["submission_id"]
                with log.open("wb") as out:
                    job = subprocess.Popen(
                        wanted["entrypoint"], shell=True, start_new_session=True, stdout=out, stderr=out
                    )
                self._jobs[wanted["submission_id"]] = job, log
                return 200, {"submission_id": wanted["submission_id"]}
            case _, ["api", "jobs", name, *verb] if name in self._jobs:
                job, log = self._jobs[name]
                if verb == ["stop"]:
                    self._stopped.add(name)
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(job.pid, signal.SIGTERM)
                    return 200, {"stopped": True}
                if verb == ["logs"]:
                    return 200, {"logs": f"Running entrypoint for job {name}: secret\n{log.read_text()}"}
                code = job.poll()
                if name in self._stopped and code is not None:
                    return 200, {"status": "STOPPED", "driver_exit_code": None}
                status = {None: "RUNNING", 0: "SUCCEEDED"}.get(code, "FAILED")
                return 200, {"status": status, "message": "secret", "driver_exit_code": code}
        return 404, "no such thing"

    def runs(self) -> int:
        """Return how many jobs run."""
        return sum(job.poll() is None for job, _ in self._jobs.values())

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for job, _ in self._jobs.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
            job.wait()
        shutil.rmtree(self._directory)


class Ray:
    """A real head of Ray with its job server, on loopback alone."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="mp-", dir="/tmp"))  # short: sockets lie below it
        ports = free_ports(2)
        self.address = f"http://127.0.0.1:{ports[0]}"
        options = {
            "node-ip-address": "127.0.0.1",
            "port": 0,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": ports[0],
            "dashboard-agent-listen-port": ports[1],
            "min-worker-port": 0,
            "max-worker-port": 0,
            "num-cpus": 2,
            "num-gpus": 0,
            "object-store-memory": 128 * 2**20,
            "temp-dir": self._directory,
        }
        start = "from ray.scripts.scripts import main; main()"
        given = [f"--{name}={value}" for name, value in options.items()]
        parent = os.getpid()
        with (self._directory / "head.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", start, "start", "--head", "--block", "--include-dashboard=true", *given],
                env={
                    **os.environ,
                    "RAY_AUTH_MODE": "token",
                    "RAY_AUTH_TOKEN": RAY_TOKEN,
                    "RAY_USAGE_STATS_ENABLED": "0",
                    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
                },
                stdout=log,
                stderr=log,
                preexec_fn=lambda: die_with_parent(parent),
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.close()
            raise

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            log = (self._directory / "head.log").read_text(errors="replace")[-2000:]
            assert self._process.poll() is None, f"Ray does not start (is ray[default] installed?): {log}"
            assert time.monotonic() < deadline, f"Ray did not start within {START_S} s: {log}"
            with contextlib.suppress(OSError):
                if b"ALIVE" in self._get("/api/v0/nodes"):
                    return
            time.sleep(0.2)

    def printed(self) -> str:
        """Return what all jobs have printed."""
        jobs = json.loads(self._get("/api/jobs/"))
        return "".join(json.loads(self._get(f"/api/jobs/{job['submission_id']}/logs"))["logs"] for job in jobs)

    def _get(self, path: str) -> bytes:
        wanted = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {RAY_TOKEN}"})
        with urllib.request.urlopen(wanted, timeout=5) as answer:
            content: bytes = answer.read()
            return content

    def close(self) -> None:
        end({(self._process.pid, 0)} | descendants({self._process.pid}))
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in socks]
