"""The network between a program and its worker breaks: the program only notices a pause, and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from millpond.pool import attach, wire
from millpond.pool.lease import Lease
from millpond.settings import PoolSettings, load
from pool.relay import Relay
from pool_site import BrokerProcess, wait_for
from worker_site import WorkerProcess

TRAINING = Path(__file__).parent / "train_models.py"

COUNT = """
import sys, torch
there = torch.zeros(300_000, device="pool")
for number in range(5):
    there += torch.full((300_000,), float(number)).to("pool")
    print(there.sum().item() / 300_000, flush=True)
    sys.stdin.readline()
there = there.cpu()
print(there.shape, there.mean().item())
"""


@pytest.fixture
def relay(worker: WorkerProcess) -> Iterator[Relay]:
    started = Relay(worker.port)
    yield started
    started.down()


def through(relay: Relay, worker: WorkerProcess) -> dict[str, str]:
    """The environment of a program that reaches its worker by the relay."""
    address = msgspec.structs.replace(worker.address, port=relay.port)
    return {**os.environ, **attach.environment("lease-1", [address])}


def start(program: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def step(process: subprocess.Popen[str]) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def test_a_program_goes_on_where_it_was_after_its_connection_broke(worker, relay):
    with start(COUNT, through(relay, worker)) as process:
        assert process.stdout is not None
        shown = [process.stdout.readline()]
        for _ in range(4):
            relay.cut()
            shown.append(step(process))
        relay.cut()
        rest, errors = process.communicate("\n", timeout=60)
    assert [float(line) for line in shown] == [0, 1, 3, 6, 10]
    assert rest == "torch.Size([300000]) 10.0\n", errors
    assert "is back after" in errors
    assert process.returncode == 0


def test_a_session_whose_client_comes_back_too_late_says_so(worker, relay):
    with start(COUNT, through(relay, worker)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with worker.dial() as connection:  # someone else's try, by a session that never was
            connection.send(wire.Attach(b"s" * 16, resumes=True))
            refused, _ = connection.receive(10)
        assert isinstance(refused, wire.Refused)
        assert "was away for too long" in refused.message
        relay.down()
        _, errors = process.communicate("\n", timeout=60)
    assert process.returncode == 1
    assert "ConnectionLost: lost the pool device pool:0 (lease lease-1, worker 127.0.0.1:" in errors
    assert "s after that nothing answers at 127.0.0.1:" in errors


@pytest.mark.slow
def test_training_gives_the_same_losses_over_a_connection_that_breaks_all_the_time(worker, relay):
    def losses(device: str, environment: dict[str, str] | None = None) -> dict[str, list[float]]:
        command = [sys.executable, str(TRAINING), device]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    expected = losses("cpu")
    stop = threading.Event()
    cutting = threading.Thread(target=relay.cut_often, args=(stop, 11))
    cutting.start()
    try:
        pooled = losses("pool", through(relay, worker))
    finally:
        stop.set()
        cutting.join()
    assert relay.cuts > 10
    for run, losses_of_run in expected.items():
        assert pooled[run] == pytest.approx(losses_of_run, abs=1e-5), run


# --- leases ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    started = BrokerProcess(tmp_path / "pool", "serves:8")
    yield started
    started.close()


def test_a_lease_outlives_a_break_between_its_client_and_the_broker(broker):
    relay = Relay(broker.port)
    settings = load(PoolSettings, {**broker.environ, "MILLPOND_POOL_ADDRESS": f"127.0.0.1:{relay.port}"})
    with Lease.acquire(settings, "ann") as lease:
        before = lease.connection
        relay.cut()
        wait_for(lambda: lease.keep() == "" and lease.connection is not before and lease.connection.is_open)
        assert broker.lease_status(lease.granted.lease).state == "active"
        assert lease.keep() == ""
    assert broker.lease_status(lease.granted.lease).state == "released"
    relay.down()


def test_a_lease_is_given_back_only_to_who_knows_its_workers_token(broker):
    with broker.acquire() as lease, broker.connect() as thief:
        thief.send(wire.Reattach(lease.granted.lease, "guessed"))
        refused, _ = thief.receive(10)
        assert isinstance(refused, wire.Refused)
        assert f"knows no {lease.granted.lease} of yours" in refused.message
        assert lease.keep() == ""


def test_a_client_that_comes_back_for_a_lease_that_ended_is_told_why(broker):
    with broker.acquire() as lease:
        lease.connection.close()
        for worker in broker.workers():
            worker.kill()
        broker.wait_ended(lease.granted.lease)
        assert "was ended by SIGKILL" in wait_for(lease.keep)


# --- silence: two hosts, and a cable that is pulled -----------------------------------------------------------------

IN_TRAINING = """
import torch
there = torch.zeros(64, 64, device="pool")
print("started", flush=True)
for number in range(100_000):
    there += 1
    if number % 1000 == 999:
        print(there[0, 0].item(), flush=True)
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def far_host() -> Iterator[str]:
    """A network namespace at 10.213.7.2, seen from here by the link `millpond-a` with 10.213.7.1; gives its name."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and ip(8)")
    name = f"millpond-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("link", "add", "millpond-a", "type", "veth", "peer", "name", "millpond-b", "netns", name)
    except subprocess.CalledProcessError as error:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        pytest.skip(f"no network namespaces here: {error.stderr!r}")
    try:
        ip("addr", "add", "10.213.7.1/24", "dev", "millpond-a")
        ip("link", "set", "millpond-a", "up")
        ip("-n", name, "addr", "add", "10.213.7.2/24", "dev", "millpond-b")
        ip("-n", name, "link", "set", "millpond-b", "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        ip("netns", "delete", name)


@pytest.mark.slow
def test_a_cable_pulled_for_fifteen_seconds_is_only_a_pause(far_host, tmp_path):
    environ = {"MILLPOND_POOL_BIND": "10.213.7.1", "MILLPOND_POOL_MEMORY": "1GiB"}
    broker = BrokerProcess(tmp_path / "pool", **environ)
    log = tmp_path / "run.log"
    try:
        run = [sys.executable, "-m", "millpond", "pool", "run", "--", sys.executable, "-c", IN_TRAINING]
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", far_host, *run], env=broker.environ, stdout=output, stderr=output
            )
        wait_for(lambda: "\n3000.0\n" in log.read_text(), 60)
        ip("link", "set", "millpond-a", "down")
        pulled = time.monotonic()
        wait_for(lambda: time.monotonic() - pulled > 15, 30)
        ip("link", "set", "millpond-a", "up")
        assert process.wait(100) == 0, log.read_text()
    finally:
        broker.close()
    numbers = [float(line) for line in log.read_text().splitlines() if line.endswith(".0")]
    assert numbers == [1000.0 * count for count in range(1, 101)]
