"""The network between a program and its worker breaks: the program only notices a pause, and loses nothing."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from millpond.pool import attach, transport, wire
from millpond.pool.lease import Lease
from millpond.settings import PoolSettings, load
from pool.relay import Relay
from pool_site import BrokerProcess, wait_for
from worker_site import WorkerProcess, Workers

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


# --- copies between the workers of one lease ----------------------------------------------------------------------


@pytest.fixture
def start_apart(tmp_path: Path) -> Iterator[Callable[..., tuple[Workers, list[Relay]]]]:
    """Start two workers that reach each other by relays only: `relays[1]` is the way to the second."""
    started: list[Workers] = []
    relays: list[Relay] = []

    def route(port: int) -> int:
        relays.append(Relay(port))
        return relays[-1].port

    def start(grace_s: float = 30.0) -> tuple[Workers, list[Relay]]:
        started.append(Workers(log=tmp_path / "worker", grace_s=grace_s, route=route))
        return started[-1], relays

    yield start
    for workers in started:
        workers.close()
    for relay in relays:
        relay.down()


def session(worker: WorkerProcess, *items: wire.Item) -> transport.Connection:
    connection = worker.connect()
    connection.send(wire.Batch(list(items)))
    return connection


def uint8(size: int) -> wire.Geometry:
    return wire.Geometry("uint8", (size,), (1,))


def copied(workers: Workers, ticket: bytes) -> bool:
    """Return whether a copy arrives."""
    sender, receiver = copy(workers, ticket)
    with sender, receiver:
        message, payload = receiver.receive(20)
        return (message, bytes(payload)) == (wire.Data(), bytes(range(8)))


def copy(workers: Workers, ticket: bytes) -> tuple[transport.Connection, transport.Connection]:
    """Issue a copy of eight bytes from the first worker to the second, which is asked for them."""
    sender = session(workers.each[0], wire.Put(1, "uint8", (8,), bytes(range(8))), wire.Send(1, 1, ticket))
    return sender, session(workers.each[1], wire.Receive(5, 0, ticket, uint8(8)), wire.Read(5, 0, 8))


def test_a_copy_whose_bytes_were_lost_on_the_way_arrives_after_all(start_apart):
    workers, relays = start_apart()
    assert copied(workers, b"0" * 16)
    for number in range(1, 5):
        relays[1].swallow()  # as when the cable goes: the sender's kernel has taken the bytes, and nobody gets them
        sender, receiver = copy(workers, bytes([number]) * 16)
        with sender, receiver:
            wait_for(lambda: relays[1].swallowed_bytes)
            relays[1].cut()
            message, payload = receiver.receive(20)
            assert (message, bytes(payload)) == (wire.Data(), bytes(range(8)))


COPIES = """
import sys, torch
there, sums = torch.zeros(3_000_000, device="cuda:0"), []
for number in range(12):
    there += 1
    over = there.to("cuda:1")
    there += 1  # not in the copy, however late that is sent again
    back = over.mul_(2).to("cuda:0")
    sums.append(back.sum() / 6_000_000 + there[:9].to("cuda:1").to("cuda:0").sum())
    print(number, flush=True)
    if number % 3 == 0:
        sys.stdin.readline()
print([value.item() for value in sums])
"""


@pytest.mark.slow
def test_copies_are_whole_and_in_order_over_connections_that_break_all_the_time(start_apart):
    workers, relays = start_apart()
    stop = threading.Event()
    cutting = [threading.Thread(target=relay.cut_often, args=(stop, 3 + place)) for place, relay in enumerate(relays)]
    for thread in cutting:
        thread.start()
    try:
        with start(COPIES, workers.environment()) as process:
            shown, errors = process.communicate("\n" * 9, timeout=100)
    finally:
        stop.set()
        for thread in cutting:
            thread.join()
    assert min(relay.cuts for relay in relays) >= 2
    expected = [(2 * number + 1) + 9 * (2 * number + 2) for number in range(12)]
    assert json.loads(shown.splitlines()[-1]) == expected, errors


@pytest.mark.slow
def test_workers_that_lose_each_other_for_good_say_so_at_both_ends_and_copy_again_when_they_can(start_apart):
    workers, relays = start_apart(grace_s=1.0)
    sender, receiver = copy(workers, b"0" * 16)
    with sender, receiver:
        assert receiver.receive(20)[0] == wire.Data()
        for relay in relays:
            relay.down()
        started = time.monotonic()
        receiver.send(wire.Batch([wire.Receive(6, 0, b"1" * 16, uint8(8)), wire.Read(6, 0, 8)]))
        received, _ = receiver.receive(20)
        assert isinstance(received, wire.Failed)
        assert "nothing comes any more from device 0 of this lease at 127.0.0.1 to device 1 at" in received.message
        assert "has not come back within 1 s" in received.message
        sender.send(wire.Batch([wire.Send(1, 1, b"2" * 16), wire.Synchronize()]))
        sent, _ = sender.receive(20)
        assert isinstance(sent, wire.Failed)
        assert "the worker of device 1 of this lease cannot be reached at 127.0.0.1:" in sent.message
        assert "from that of device 0 at 127.0.0.1: " in sent.message
        assert re.search(r"and for \d s after that", sent.message)
        assert time.monotonic() - started < 15
        for relay in relays:
            relay.up()
    wait_for(lambda: copied(workers, secrets.token_bytes(16)))


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
