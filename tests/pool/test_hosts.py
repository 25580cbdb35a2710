"""Hosts that join a broker elsewhere, with real processes and sockets; workers are stand-ins but for the slow tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from millpond.pool.lease import Lease
from pool.relay import Relay
from pool_site import DEADLINE_S, GIB, BrokerProcess, HostProcess, wait_for

MILLPOND = [sys.executable, "-m", "millpond", "pool"]
OWN = socket.gethostname()[:64]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[BrokerProcess]:
    """A broker with one device of its own."""
    broker = BrokerProcess(tmp_path / "pool", "serves:4")
    yield broker
    broker.close()


@pytest.fixture
def join(site: BrokerProcess) -> Iterator[Callable[..., HostProcess]]:
    """Have hosts join it."""
    started = []

    def start(name: str = "gpu-2", *devices: str, **options) -> HostProcess:
        started.append(HostProcess(site, name, *(devices or ("serves:8",)), **options))
        return started[-1]

    yield start
    for host in started:
        host.close()


def hosts(site: BrokerProcess) -> list[tuple[int, str]]:
    return [(device.index, device.host) for device in site.status().devices]


def wait_lost(lease: Lease, deadline_s: float = DEADLINE_S) -> str:
    return wait_for(lease.keep, deadline_s)


def are_gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, DEADLINE_S)[1]


def test_a_joined_hosts_devices_are_lent_and_their_workers_run_there(site, join):
    host = join("gpu-2", "serves:8", "serves:16")
    assert hosts(site) == [(0, OWN), (1, "gpu-2"), (2, "gpu-2")]
    with site.acquire(memory_bytes=10 * GIB) as lease:
        (worker,) = lease.granted.workers
        assert [process.pid for process in host.workers()] == [worker.pid]
        assert (worker.host, worker.memory_bytes) == ("127.0.0.1", 10 * GIB)
        with socket.create_connection((worker.host, worker.port), timeout=DEADLINE_S):
            pass
        status = site.lease_status(lease.granted.lease)
        assert (status.state, status.devices) == ("active", [2])
        wait_for(lambda: site.lease_status(lease.granted.lease).used_bytes == 7 * 2**20)
        assert site.workers() == []
    wait_for(lambda: site.lease_status(lease.granted.lease).state == "released" and not host.workers())
    assert [device.free_bytes for device in site.status().devices] == [4 * GIB, 8 * GIB, 16 * GIB]


def test_a_lease_over_two_hosts_knows_both_and_ends_on_both(site, join):
    host = join()
    with site.acquire(devices=2) as lease:
        assert [[process.pid] for process in (*site.workers(), *host.workers())] == [
            [worker.pid] for worker in lease.granted.workers
        ]
        os.kill(lease.granted.workers[1].pid, signal.SIGKILL)
        assert f"worker {lease.granted.workers[1].pid} of device 1 was ended by SIGKILL" in wait_lost(lease)
    wait_for(lambda: not site.workers() and not host.workers())


def test_a_lost_host_fails_its_leases_and_only_those_and_comes_back_with_the_same_numbers(site, join):
    first, second = join("gpu-2"), join("gpu-3")
    assert hosts(site) == [(0, OWN), (1, "gpu-2"), (2, "gpu-3")]
    with site.acquire() as own, site.acquire() as lost:
        assert [site.lease_status(lease.granted.lease).devices for lease in (own, lost)] == [[0], [1]]
        workers = first.workers()
        first.kill()
        assert "of device 1 is lost with its host gpu-2: its connection broke" in wait_lost(lost)
        assert site.lease_status(lost.granted.lease).state == "failed"
        assert hosts(site) == [(0, OWN), (2, "gpu-3")]
        assert own.keep() == ""
        assert are_gone(workers)
        join("gpu-2")
        assert hosts(site) == [(0, OWN), (1, "gpu-2"), (2, "gpu-3")]
    assert second.process.poll() is None


@pytest.fixture
def relay(site: BrokerProcess) -> Iterator[Relay]:
    """The way of hosts to the broker."""
    started = Relay(site.port)
    yield started
    started.go_on()
    started.down()


def by(relay: Relay) -> dict[str, str]:
    return {"MILLPOND_POOL_ADDRESS": f"127.0.0.1:{relay.port}"}


def test_a_lease_on_a_host_outlives_breaks_of_its_connection_to_the_broker(site, join, relay):
    host = join(**by(relay))
    with site.acquire(memory_bytes=8 * GIB) as lease:
        (worker,) = host.workers()
        for number in range(1, 4):
            relay.cut()
            wait_for(lambda number=number: host.log.read_text().count("back with the broker after") == number)
            assert lease.keep() == ""
        assert site.lease_status(lease.granted.lease).state == "active"
        assert host.workers() == [worker]
    wait_for(lambda: not host.workers())
    wait_for(lambda: [device.free_bytes for device in site.status().devices] == [4 * GIB, 8 * GIB])


def test_both_ends_agree_again_on_what_became_of_workers_while_they_were_apart(site, join, relay):
    host = join("gpu-2", "serves:8", "serves:16", "serves:32", **by(relay))
    given_back = site.acquire(memory_bytes=8 * GIB, owner="ann")
    with (
        site.acquire(memory_bytes=16 * GIB, owner="bob") as killed,
        site.acquire(memory_bytes=32 * GIB, owner="cid") as kept,
    ):
        relay.down()
        wait_for(lambda: "the connection of host gpu-2 broke" in site.log.read_text())
        given_back.release()
        os.kill(killed.granted.workers[0].pid, signal.SIGKILL)
        wait_for(lambda: len(host.workers()) == 2)
        assert site.status().devices[1].free_bytes == 0  # its worker may still run
        relay.up()
        assert "was ended by SIGKILL" in wait_lost(killed)
        wait_for(lambda: [process.pid for process in host.workers()] == [kept.granted.workers[0].pid])
        wait_for(lambda: [device.free_bytes // GIB for device in site.status().devices] == [4, 8, 16, 0])
        assert kept.keep() == ""


def test_a_worker_that_is_wanted_while_its_host_is_apart_starts_when_that_is_back(site, join, relay):
    join(**by(relay))
    relay.hold()  # the broker does not know yet
    with contextlib.ExitStack() as stack:
        process = subprocess.Popen([*MILLPOND, "run", "--memory", "8GiB", "--", "true"], env=site.environ)
        stack.callback(process.wait, DEADLINE_S)
        wait_for(lambda: "granted" in {lease.state for lease in site.status().leases})
        relay.cut()
        relay.go_on()
        assert process.wait(DEADLINE_S) == 0


@pytest.mark.slow
def test_a_host_that_is_apart_for_longer_than_the_grace_ends_its_workers_and_fails_its_leases(tmp_path):
    site = BrokerProcess(tmp_path / "pool", "serves:4", MILLPOND_POOL_GRACE_S="4", MILLPOND_POOL_HEARTBEAT_S="1")
    relay = Relay(site.port)
    host = HostProcess(site, "gpu-2", "serves:8", **by(relay))
    try:
        with site.acquire(memory_bytes=8 * GIB) as lease:
            workers = host.workers()
            relay.hold()
            assert "is lost with its host gpu-2: nothing was heard of it for" in wait_lost(lease)
            assert not psutil.wait_procs(workers, 40)[1]
            relay.go_on()
        wait_for(lambda: hosts(site) == [(0, OWN), (1, "gpu-2")], 40)
    finally:
        host.close()
        relay.down()
        site.close()


@pytest.mark.slow
def test_a_host_that_is_killed_fails_its_leases_within_ten_seconds(site, join):
    host = join()
    with site.acquire(memory_bytes=8 * GIB) as lease:
        host.kill()
        assert "is lost with its host gpu-2: its connection broke" in wait_lost(lease, 10)


TRAIN = """
import sys, torch
torch.manual_seed(5)
x, y = torch.randn(64, 8), torch.randn(64, 1)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).to(sys.argv[1])
optimizer = torch.optim.Adam(model.parameters())
for line in sys.stdin:
    loss = torch.nn.functional.mse_loss(model(x.to(sys.argv[1])), y.to(sys.argv[1]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item(), flush=True)
"""


@pytest.mark.slow
def test_training_on_a_joined_host_does_not_notice_that_the_broker_is_out_of_reach(tmp_path):
    broker = BrokerProcess(tmp_path / "pool", "serves:1", MILLPOND_POOL_MEMORY="2GiB", MILLPOND_POOL_HEARTBEAT_S="1")
    relay = Relay(broker.port)
    host = HostProcess(broker, "gpu-2", **by(relay))
    training, pipe = [sys.executable, "-c", TRAIN], subprocess.PIPE
    try:
        local = subprocess.run(
            [*training, "cpu"], input="\n" * 20, capture_output=True, text=True, check=True, timeout=60
        )
        run = [*MILLPOND, "run", "--memory", "1.5GiB", "--", *training, "cuda"]
        with subprocess.Popen(run, env=broker.environ, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            losses = []

            def step() -> None:
                process.stdin.write("\n")
                process.stdin.flush()
                losses.append(float(process.stdout.readline()))

            step()
            relay.hold()
            for _ in range(1, 20):
                held = time.monotonic()
                step()
                wait_for(lambda held=held: time.monotonic() - held > 0.25)
            relay.go_on()
            process.stdin.close()
            assert process.wait(DEADLINE_S) == 0
        assert losses == pytest.approx([float(line) for line in local.stdout.split()], abs=1e-6)
        (lease,) = broker.status().leases
        assert (lease.devices, lease.state) == ([1], "released")
    finally:
        host.close()
        relay.down()
        broker.close()


@pytest.mark.slow
def test_a_host_that_stands_still_is_lost_and_joins_again_by_itself(site, join):
    host = join()
    with site.acquire(memory_bytes=8 * GIB) as lease:
        workers = host.workers()
        host.process.send_signal(signal.SIGSTOP)
        why = wait_lost(lease, site.settings.grace_s + DEADLINE_S)
        assert "is lost with its host gpu-2: nothing was heard of it for" in why
        wait_for(lambda: hosts(site) == [(0, OWN)])
        host.process.send_signal(signal.SIGCONT)
        assert are_gone(workers)
        wait_for(lambda: hosts(site) == [(0, OWN), (1, "gpu-2")])


@pytest.mark.slow
def test_a_host_outlives_its_broker_and_joins_the_next_one(site, join):
    host = join()
    lease = site.acquire(memory_bytes=8 * GIB)
    with lease:
        workers = host.workers()
        site.kill()
        assert are_gone(workers)
    again = BrokerProcess(site.home, "serves:4", port=site.port)
    try:
        wait_for(lambda: hosts(again) == [(0, OWN), (1, "gpu-2")])
        assert host.process.poll() is None
    finally:
        again.close()


def test_who_waits_gets_a_device_of_a_host_that_joins(site, join):
    with site.acquire(memory_bytes=4 * GIB):
        waiting = subprocess.Popen([*MILLPOND, "run", "--", "true"], env=site.environ, stderr=subprocess.DEVNULL)
        wait_for(lambda: "pending" in {lease.state for lease in site.status().leases})
        join()
        assert waiting.wait(DEADLINE_S) == 0


def test_a_host_that_leaves_takes_its_workers_along(site, join):
    host = join()
    with site.acquire(memory_bytes=8 * GIB) as lease:
        workers = host.workers()
        host.close()
        assert are_gone(workers)
        assert "gpu-2" in wait_lost(lease)
    assert host.process.returncode == 0
    assert hosts(site) == [(0, OWN)]


@pytest.mark.slow
def test_a_second_host_of_a_name_is_told_so_and_joins_when_the_first_has_left(site, join):
    first = join()
    second = join("gpu-2", "serves:16", wait=False)
    wait_for(lambda: "host gpu-2 is in the pool already. Join as another: --name" in second.log.read_text())
    first.close()
    wait_for(lambda: [device.memory_bytes for device in site.status().devices] == [4 * GIB, 16 * GIB])


def test_a_worker_that_cannot_start_on_a_joined_host_names_the_reason(site, join):
    join("gpu-2", "fails:8")
    with pytest.raises(Exception, match="the device is on fire"):
        site.acquire(memory_bytes=8 * GIB)


def call(site: BrokerProcess, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MILLPOND, *arguments],
        env={**site.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_a_wrong_token_or_address_is_a_clear_error(site):
    done = call(site, "join", "--name", "gpu-2", MILLPOND_POOL_TOKEN="wrong")
    assert done.returncode == 2
    assert "MILLPOND_POOL_TOKEN" in done.stderr
    done = call(site, "join", "nowhere", "--name", "gpu-2")
    assert done.returncode == 2
    assert "host:port" in done.stderr


def test_without_a_broker_it_says_so_once_and_tries_on_until_it_is_stopped(site, tmp_path):
    log = tmp_path / "join.log"
    with log.open("wb") as file:
        joining = subprocess.Popen([*MILLPOND, "join", "127.0.0.1:1"], env=site.environ, stdout=file, stderr=file)
    wait_for(lambda: "not in the pool, trying again every 2 s: No pool can be reached" in log.read_text())
    joining.send_signal(signal.SIGINT)
    assert joining.wait(DEADLINE_S) == 0
    assert "Traceback" not in log.read_text()


def test_status_shows_the_host_of_each_device(site, join):
    join()
    shown = call(site, "status").stdout
    assert any("gpu-2" in line and "stand-in 0" in line for line in shown.splitlines())


COPY = """
import torch
there = torch.arange(1 << 20, device="cuda:0").to("cuda:1")
weight = torch.ones(3, device="cuda:0", requires_grad=True)
(weight.to("cuda:1") * 2).sum().backward()
print(there.device, there.sum().item() == (1 << 19) * ((1 << 20) - 1), weight.grad.tolist())
"""


@pytest.mark.slow
def test_a_program_computes_on_two_hosts(tmp_path):
    broker = BrokerProcess(tmp_path / "pool", MILLPOND_POOL_MEMORY="1GiB")
    host = HostProcess(broker, "gpu-2")
    try:
        done = call(broker, "run", "-n", "2", "--", sys.executable, "-c", COPY)
        assert (done.returncode, done.stdout.strip()) == (0, "cuda:1 True [2.0, 2.0, 2.0]"), done.stderr
    finally:
        host.close()
        broker.close()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@contextlib.contextmanager
def network_between_two_hosts(prefix: str) -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them: 10.77.0.1 and 10.77.0.2."""
    one, other = f"{prefix}-1", f"{prefix}-2"
    try:
        try:
            for name in (one, other):
                ip("netns", "add", name)
            ip("-n", one, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", other)
            for name, address in ((one, "10.77.0.1/24"), (other, "10.77.0.2/24")):
                ip("-n", name, "addr", "add", address, "dev", "cable")
                for device in ("cable", "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield one, other
    finally:
        for name in (one, other):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)


@contextlib.contextmanager
def two_machines(tmp_path: Path, grace_s: int) -> Iterator[tuple[str, Callable[..., subprocess.Popen[bytes]]]]:
    """A broker on the one, a joined host on the other; gives the first's name, and how to start `millpond pool`."""
    environ = {
        **os.environ,
        "MILLPOND_HOME": str(tmp_path / "state"),
        "MILLPOND_POOL_TOKEN": "the pool's token",
        "MILLPOND_POOL_ADDRESS": "10.77.0.1:7070",
        "MILLPOND_POOL_MEMORY": "1GiB",
        "MILLPOND_POOL_GRACE_S": str(grace_s),
        "OMP_NUM_THREADS": "1",
    }
    with network_between_two_hosts(f"millpond-{os.getpid()}") as (one, other), contextlib.ExitStack() as stack:

        def start(*arguments: str, where: str = one) -> subprocess.Popen[bytes]:
            log = stack.enter_context((tmp_path / f"{arguments[0]}.log").open("wb"))
            command = ["ip", "netns", "exec", where, *MILLPOND, *arguments]
            process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            stack.callback(process.wait, DEADLINE_S)
            stack.callback(process.send_signal, signal.SIGTERM)
            return process

        start("serve", "--bind", "0.0.0.0")
        start("join", "--name", "gpu-2", where=other)
        wait_for(lambda: "millpond pool: joined" in (tmp_path / "join.log").read_text(), 60)
        yield one, start


@pytest.mark.slow
def test_two_machines_with_a_cable_between_them_and_then_without_it(tmp_path):
    with two_machines(tmp_path, grace_s=4) as (one, start):

        def status() -> str:
            asked = start("status", "--json")
            assert asked.wait(60) == 0
            return (tmp_path / "status.log").read_text()

        ran = start("run", "-n", "2", "--", sys.executable, "-c", COPY)
        assert ran.wait(120) == 0, (tmp_path / "run.log").read_text()
        assert "cuda:1 True [2.0, 2.0, 2.0]" in (tmp_path / "run.log").read_text()
        hold = start("run", "-n", "2", "--", "sleep", "600")
        wait_for(lambda: '"active"' in status(), 60)
        ip("-n", one, "link", "set", "cable", "down")
        assert hold.wait(60) != 0
        wait_for(lambda: "is lost with its host gpu-2" in status() and '"host": "gpu-2"' not in status(), 60)
        ip("-n", one, "link", "set", "cable", "up")
        wait_for(lambda: '"host": "gpu-2"' in status(), 60)


BACK_AND_FORTH = """
import time, torch
there = torch.zeros(300_000, device="cuda:0")
started, rounds = time.monotonic(), 0
while time.monotonic() - started < 30:
    there = (there.to("cuda:1") + 1).to("cuda:0") + 1
    if (rounds := rounds + 1) % 10 == 0:
        print("round", rounds, there.min().item() == there.max().item() == 2 * rounds, flush=True)
print("end", there.min().item() == there.max().item() == 2 * rounds)
"""


@pytest.mark.slow
def test_a_cable_pulled_between_two_hosts_of_a_lease_for_twelve_seconds_is_only_a_pause(tmp_path):
    with two_machines(tmp_path, grace_s=30) as (one, start):
        ran = start("run", "-n", "2", "--", sys.executable, "-c", BACK_AND_FORTH)
        wait_for(lambda: "round 20 True" in (tmp_path / "run.log").read_text(), 60)
        ip("-n", one, "link", "set", "cable", "down")
        pulled = time.monotonic()
        wait_for(lambda: time.monotonic() - pulled > 12)
        ip("-n", one, "link", "set", "cable", "up")
        assert ran.wait(100) == 0, (tmp_path / "run.log").read_text()
        shown = (tmp_path / "run.log").read_text()
        assert "end True" in shown
        assert "False" not in shown
        assert "host gpu-2 is lost" not in (tmp_path / "serve.log").read_text()
