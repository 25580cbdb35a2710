"""A worker that has been made to run a client's code: what it cannot do to its host then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from millpond import confine
from millpond.pool import wire
from worker_site import WorkerProcess

PROGRAM = """
import ctypes, json, os, resource, socket, subprocess, sys
from pathlib import Path
from millpond import confine
outside, port, lacks_landlock = sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["no Landlock"]
if lacks_landlock:
    confine._CREATE_RULESET = 4095  # a system call that no kernel has
report = {"lacking": confine.confine(gpu=False, connects=False)}
attempts = {
    "write a file": lambda: Path(outside, "new").write_text("x"),
    "change a file": lambda: Path(outside, "old").write_text("x"),
    "delete a file": lambda: Path(outside, "old").unlink(),
    "make a link": lambda: Path(outside, "link").symlink_to("old"),
    "read a file": lambda: Path(outside, "old").read_text(),
    "list a directory": lambda: os.listdir(outside),
    "run a program": lambda: subprocess.run(["/bin/true"], check=True),
    "signal another process": lambda: os.kill(os.getppid(), 0),
    "read another process's environment": lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
    "connect to a service": lambda: socket.create_connection(("127.0.0.1", port)).close(),
    "share memory": lambda: Path("/dev/shm/millpond-test").write_text("x"),
}
for name, attempt in attempts.items():
    try:
        attempt()
        report[name] = "done"
    except OSError as error:
        report[name] = type(error).__name__
listener = socket.create_server(("127.0.0.1", 0))
if not lacks_landlock:  # else a whole worker shows it
    import ctypes.util
    ctypes.util.find_library("dl")  # what PyTorch for CUDA does, which by itself runs a compiler where there is one
    import torch
    report["work"] = float(torch.ones(40, 40).mm(torch.ones(40, 40)).sum() + torch.linalg.svd(torch.eye(3))[1].sum())
report["status"] = dict(line.split(":\\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
report["dumpable"] = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
report["limits"] = [resource.getrlimit(limit) for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE)]
json.dump(report, sys.stdout)
"""
FORBIDDEN = (
    "write a file", "change a file", "delete a file", "make a link", "read a file", "list a directory",
    "run a program", "signal another process", "read another process's environment", "connect to a service",
    "share memory",
)  # fmt: skip


def kernel_has_landlock() -> bool:
    return confine._libc.syscall(confine._CREATE_RULESET, None, 0, 1) >= 6


def run(outside: Path, *options: str) -> dict:
    import socket

    (outside / "old").write_text("a secret")
    with socket.create_server(("127.0.0.1", 0)) as service:
        port = str(service.getsockname()[1])
        command = [sys.executable, "-c", PROGRAM, str(outside), port, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    outside = tmp_path_factory.mktemp("outside")
    report = run(outside)
    if report["lacking"] == "":
        assert [path.name for path in outside.iterdir()] == ["old"]
        assert (outside / "old").read_text() == "a secret"
    return report


@pytest.mark.skipif(not kernel_has_landlock(), reason="this kernel has no Landlock, or one before version 6")
@pytest.mark.parametrize("what", FORBIDDEN)
def test_it_cannot(report, what):
    assert report[what] == "PermissionError"


def check_what_needs_no_landlock(report: dict) -> None:
    assert report["status"]["NoNewPrivs"] == "1"
    assert int(report["status"]["CapEff"], 16) in (0, confine._OF_ROOT)
    assert report["dumpable"] == 0
    assert report["limits"] == [[0, 0], [confine.MAX_FILE_BYTES] * 2]


def test_it_computes_and_leaves_no_core_and_gains_nothing(report):
    assert report["work"] == 40**3 + 3
    check_what_needs_no_landlock(report)


def test_a_kernel_without_landlock_is_told_of_and_takes_the_rest(tmp_path):
    report = run(tmp_path, "no Landlock")
    assert "has no Landlock" in report["lacking"]
    assert report["write a file"] == "done"
    check_what_needs_no_landlock(report)


WITHOUT = """
from millpond import confine
from millpond.pool import worker
confine._CREATE_RULESET = 4095
worker.main()
"""


def test_a_worker_without_landlock_says_so_in_one_line_and_works(tmp_path):
    worker = WorkerProcess(log=tmp_path / "log", command=(sys.executable, "-c", WITHOUT))
    try:
        with worker.connect() as connection:
            connection.send(wire.Batch([wire.Put(1, "uint8", (1,), b"x"), wire.Read(1, 0, 1)]))
            assert bytes(connection.receive(20)[1]) == b"x"
        lines = worker.log.read_text().splitlines()
    finally:
        worker.close()
    assert [("has no Landlock" in line, "lease-1" in line) for line in lines] == [(True, True)]


def test_a_worker_inherits_no_secrets():
    environ = {
        **{"PATH": "/bin", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0", "LC_ALL": "C", "PYTHONPATH": "src"},
        **{
            "MILLPOND_POOL_TOKEN": "t",
            "MILLPOND_HUB_EDGE_TOKEN": "t",
            "AWS_SECRET_ACCESS_KEY": "t",
            "DATABASE_URL": "t",
        },
        **{"MILLPOND_POOL_TLS_KEY": "t", "MILLPOND_POOL_LEASE": "t"},
    }
    inherited = confine.environment(environ)
    assert inherited.keys() - confine.DEFAULTS == {
        *("CUDA_VISIBLE_DEVICES", "LC_ALL", "OMP_NUM_THREADS", "PATH", "PYTHONPATH")
    }
    chosen = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "OMP_WAIT_POLICY": "ACTIVE"}
    assert confine.environment(chosen) == chosen
    assert confine.environment(os.environ | {"MILLPOND_POOL_CONFINE": "no"})["MILLPOND_POOL_CONFINE"] == "no"


JOB = """
import os, sys, threading
from pathlib import Path
from millpond.confine import MAX_FILE_BYTES, confine
outside, work = Path(sys.argv[1]), Path(sys.argv[2])
if sys.argv[3:]:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print(confine(gpu=False, connects=False, writes=str(work)))
(work / "new").write_bytes(bytes(MAX_FILE_BYTES + 1))
(work / "new").rename(work / "old")
print(len((work / "old").read_bytes()) - MAX_FILE_BYTES)
(work / "old").unlink()
for attempt in (
    lambda: (outside / "secret").read_text(),
    lambda: (outside / "new").write_text("x"),
    lambda: (outside / "secret").rename(work / "secret"),
    lambda: os.link(outside / "secret", work / "secret"),
    lambda: (work / "link").symlink_to(outside / "secret"),
    lambda: os.mkfifo(work / "fifo"),
    lambda: os.execv("/bin/true", ["true"]),
):
    try:
        attempt()
        print("done")
    except OSError:
        print("refused")
"""


def run_job(directory: Path, *options: str) -> list[str]:
    outside, work = directory / "outside", directory / "work"
    outside.mkdir()
    work.mkdir()
    (outside / "secret").write_text("a secret")
    command = [sys.executable, "-c", JOB, str(outside), str(work), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (outside / "secret").read_text() == "a secret"
    return done.stdout.splitlines()


@pytest.mark.skipif(not kernel_has_landlock(), reason="this kernel has no Landlock, or one before version 6")
def test_a_job_writes_files_in_its_directory_and_nothing_else(tmp_path):
    assert run_job(tmp_path) == ["", "1", *["refused"] * 7]


@pytest.mark.skipif(not kernel_has_landlock(), reason="this kernel has no Landlock, or one before version 6")
def test_a_thread_that_began_before_is_told_of(tmp_path):
    assert run_job(tmp_path, "with a thread")[0] == "1 thread(s) began before"
