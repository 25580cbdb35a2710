"""`serve` with real processes: the ready line, ends of all kinds, what is left behind, metrics over workers."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest

from waiting import wait_for

PROGRAM = Path(__file__).with_name("serving_program.py")
DEADLINE_S = 15.0
T = TypeVar("T")


class Program:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def launch(self, *arguments: Any) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, str(PROGRAM), *map(str, arguments)], stdout=log, stderr=log, start_new_session=True
            )

    def start(self, port: int = 0, workers: int = 1) -> None:
        self.process = self.launch(port, workers, self.directory)
        found = self.wait_for(lambda: re.search(r"millpond edge: listening on (\S+)\n", self.log.read_text()))
        self.url = found[1]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def children(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def companion(self) -> int:
        return int(self.wait_for(lambda: (self.directory / "companion").read_text()))

    def wait_for(self, condition: Callable[[], T]) -> T:
        return wait_for(condition, what=self.log.read_text, despite=(OSError, httpx.HTTPError))


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    program = Program(tmp_path)
    yield program
    if program.process is not None and program.process.poll() is None:
        program.process.kill()
        program.process.wait(DEADLINE_S)


def test_it_says_where_it_listens_once_and_ends_well_on_sigterm(program: Program) -> None:
    program.start()
    assert httpx.get(f"{program.url}/healthz").json() == {"status": "ok"}
    children = program.children()
    assert len(children) == 2  # a worker and a companion
    began = time.monotonic()
    assert program.process is not None
    program.process.terminate()
    assert program.process.wait(DEADLINE_S) == 0
    assert time.monotonic() - began < 3
    assert (program.directory / "ended-well").exists()
    assert not any(child.is_running() for child in children)
    assert program.log.read_text() == f"millpond edge: listening on {program.url}\n"


def test_sigterm_lets_running_requests_finish(program: Program) -> None:
    program.start()
    answers: list[httpx.Response] = []
    request = threading.Thread(target=lambda: answers.append(httpx.get(f"{program.url}/slow", timeout=10)))
    request.start()
    program.wait_for((program.directory / "slow-began").exists)
    assert program.process is not None
    program.process.terminate()
    request.join()
    assert answers[0].json() == "done"
    program.process.wait(DEADLINE_S)


def test_ctrl_c_ends_all_of_it(program: Program) -> None:
    program.start(workers=2)
    children = program.children()
    assert program.process is not None
    os.killpg(program.process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    assert program.process.wait(DEADLINE_S) == 0
    assert not any(child.is_running() for child in children)
    assert "Traceback" not in program.log.read_text()


def test_kill_9_of_the_master_leaves_nothing_and_frees_the_port(program: Program) -> None:
    program.start(workers=2)
    children, port = program.children(), program.port
    assert program.process is not None
    program.process.kill()
    program.process.wait(DEADLINE_S)
    assert psutil.wait_procs(children, timeout=5)[1] == []
    program.start(port=port)
    assert httpx.get(f"{program.url}/healthz").status_code == 200


def test_a_killed_worker_and_a_killed_companion_are_started_again(program: Program) -> None:
    program.start()
    worker, companion = httpx.get(f"{program.url}/pid").json(), program.companion()
    os.kill(worker, signal.SIGKILL)
    os.kill(companion, signal.SIGKILL)
    assert program.wait_for(lambda: httpx.get(f"{program.url}/pid").json() != worker)
    assert program.wait_for(lambda: program.companion() != companion)


def test_a_port_in_use_is_a_clear_error(program: Program) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = program.launch(port, 1, program.directory)
        assert process.wait(DEADLINE_S) == 2
    said = program.log.read_text()
    assert f"cannot listen on 127.0.0.1, port {port}: another process listens there" in said
    assert "MILLPOND_EDGE_PORT" in said


def test_beyond_loopback_it_wants_a_token(program: Program) -> None:
    assert program.launch(0, 1, program.directory, "0.0.0.0").wait(DEADLINE_S) == 2
    assert "MILLPOND_EDGE_TOKEN" in program.log.read_text()


def test_an_application_that_cannot_load_ends_the_program(program: Program) -> None:
    (program.directory / "fail").touch()
    assert program.launch(0, 1, program.directory).wait(DEADLINE_S) == 2
    said = program.log.read_text()
    assert "this worker cannot start" in said
    assert "no worker could start" in said


def test_a_body_over_the_limit_is_answered_not_reset(program: Program) -> None:
    program.start()
    with httpx.Client(base_url=program.url, timeout=10) as client:
        assert client.post("/echo", content=b"x" * 10_000).json() == 10_000
        response = client.post("/echo", content=b"x" * 20_000_000)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
        assert response.headers["Connection"] == "close"  # else the next request could meet its end
        assert client.get("/healthz").status_code == 200


def test_a_connection_outlives_a_short_body_that_nobody_reads(program: Program) -> None:
    program.start()
    with socket.create_connection(("127.0.0.1", program.port), timeout=10) as client:
        for _ in range(3):
            client.sendall(b"POST /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5000\r\n\r\n" + b"x" * 5000)
            answer = b""
            while not answer.rstrip().endswith(b"}}"):
                received = client.recv(65536)
                assert received, answer
                answer += received
            assert answer.startswith(b"HTTP/1.1 404")
            assert b"Connection: keep-alive" in answer


def test_metrics_count_over_all_workers_and_never_by_path(program: Program) -> None:
    program.start(workers=2)
    pids = set()
    while len(pids) < 2:  # new connections until both workers have answered
        pids.add(httpx.get(f"{program.url}/pid").json())
    httpx.get(f"{program.url}/made-up-1")
    httpx.get(f"{program.url}/made-up-2")
    text = httpx.get(f"{program.url}/metrics").text
    counted = re.search(
        r'millpond_http_requests_total\{method="GET",program="edge",route="/pid",status="200"\} (\S+)', text
    )
    assert counted is not None
    assert float(counted[1]) >= 2
    assert 'route="(none)",status="404"} 2.0' in text
    assert "made-up" not in text
