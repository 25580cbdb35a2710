"""The broker with real sockets, processes and disk; its workers are stand-ins but for one test."""

import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from millpond.pool import wire
from millpond.pool.errors import AuthenticationError, ConnectionLost, LeaseError, PoolError, VersionMismatch
from millpond.pool.lease import Lease, connect, get_status
from millpond.pool.scheduler import MAX_PENDING
from millpond.pool.transport import connect as connect_raw
from millpond.settings import PoolSettings, SettingsError, load
from pool_site import DEADLINE_S, GIB, TOKEN, BrokerProcess, wait_for


@pytest.fixture
def start_broker(tmp_path: Path) -> Iterator[Callable[..., BrokerProcess]]:
    started = []

    def start(*devices: str, **options) -> BrokerProcess:
        started.append(BrokerProcess(tmp_path / "pool", *(devices or ("serves:8",)), **options))
        return started[-1]

    yield start
    for broker in started:
        broker.close()


@pytest.fixture
def broker(start_broker) -> BrokerProcess:
    return start_broker()


def wait_lost(lease: Lease) -> str:
    return wait_for(lease.keep)


def keep_for(lease: Lease, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert lease.keep() == ""
        time.sleep(0.02)


def test_a_lease_names_its_worker_and_ends_with_it(broker):
    with broker.acquire() as lease:
        (worker,) = lease.granted.workers
        assert [process.pid for process in broker.workers()] == [worker.pid]
        assert (worker.host, worker.memory_bytes, worker.device) == ("127.0.0.1", 8 * GIB, "stand-in 0")
        status = broker.lease_status(lease.granted.lease)
        assert (status.state, status.owner, status.devices) == ("active", "ann", [0])
        assert broker.status().devices[0].free_bytes == 0
        wait_for(lambda: broker.lease_status(lease.granted.lease).used_bytes == 7 * 2**20)
    ended = broker.wait_ended(lease.granted.lease)
    assert (ended.state, ended.used_bytes) == ("released", 0)
    assert broker.status().devices[0].free_bytes == 8 * GIB
    assert not psutil.pid_exists(worker.pid)


def test_each_lease_has_an_own_token_which_is_nowhere_to_be_seen(start_broker):
    broker = start_broker("serves:8", "serves:8")
    with broker.acquire() as one, broker.acquire() as two:
        tokens = {one.granted.workers[0].token, two.granted.workers[0].token}
        assert len(tokens) == 2
        seen = broker.log.read_text() + (broker.home / "state/pool/leases.json").read_text()
        for process in broker.workers():
            seen += " ".join(process.cmdline()) + str(process.environ())
        assert not any(token in seen for token in [*tokens, TOKEN])


def test_the_token_never_crosses_the_wire(broker, monkeypatch):
    import socket

    crossed = bytearray()
    real = socket.socket.sendall

    def record(self, data, *rest):
        crossed.extend(data)
        return real(self, data, *rest)

    monkeypatch.setattr(socket.socket, "sendall", record)
    broker.status()
    assert len(crossed) > 100
    assert TOKEN.encode() not in crossed


def test_a_wrong_token_is_refused_and_says_what_to_set(broker):
    settings = load(PoolSettings, {**broker.environ, "MILLPOND_POOL_TOKEN": "wrong"})
    with pytest.raises(AuthenticationError, match="MILLPOND_POOL_TOKEN"):
        connect(settings, "eve")


def test_another_torch_is_refused_and_says_what_to_install(broker):
    with pytest.raises(VersionMismatch, match="pip install"):
        connect_raw("127.0.0.1", broker.port, TOKEN, "1.13", sends="to-broker", receives="from-broker")


def test_parts_run_side_by_side_and_a_whole_device_waits_for_them(broker):
    waited = []
    with broker.acquire(memory_bytes=3 * GIB) as one, broker.acquire(memory_bytes=5 * GIB):
        assert one.granted.workers[0].memory_bytes == 3 * GIB
        with pytest.raises(LeaseError, match=r"no device was free within 0\.1 s \(held: device 0 by ann, ann"):
            broker.acquire("bob", wait_s=0.1, on_wait=waited.append)
    assert [waiting.reason for waiting in waited] == ["held: device 0 by ann, ann"]
    with broker.acquire(wait_s=DEADLINE_S):
        pass


def test_a_lease_of_two_devices_has_two_workers(start_broker):
    broker = start_broker("serves:8", "serves:4")
    with broker.acquire(devices=2) as lease:
        assert [worker.memory_bytes for worker in lease.granted.workers] == [8 * GIB, 4 * GIB]
        assert len({worker.port for worker in lease.granted.workers}) == 2
        os.kill(lease.granted.workers[1].pid, signal.SIGKILL)
        assert f"worker {lease.granted.workers[1].pid} of device 1 was ended by SIGKILL" in wait_lost(lease)
        assert broker.wait_ended(lease.granted.lease).state == "failed"


def test_what_can_never_be_lent_is_refused_at_once(broker):
    with pytest.raises(LeaseError, match=r"can never lend 2 device"):
        broker.acquire(devices=2, wait_s=1e6)


def test_a_killed_worker_ends_the_lease_with_the_reason(broker):
    lease = broker.acquire()
    os.kill(lease.granted.workers[0].pid, signal.SIGKILL)
    assert "was ended by SIGKILL" in wait_lost(lease)
    lease.release()
    ended = broker.wait_ended(lease.granted.lease)
    assert (ended.state, "SIGKILL" in ended.reason) == ("failed", True)
    with broker.acquire(wait_s=DEADLINE_S):  # and the device is there for the next
        pass


def test_a_worker_that_cannot_start_fails_the_lease_with_its_last_words(start_broker):
    broker = start_broker("fails:8")
    with pytest.raises(LeaseError, match="ended with exit code 1: the device is on fire"):
        broker.acquire()
    assert broker.status().leases[0].state == "failed"


def test_a_client_that_hangs_up_and_does_not_come_back_loses_its_lease_soon(broker):
    lease = broker.acquire()
    lease.connection.close()
    ended = broker.wait_ended(lease.granted.lease, 10)
    assert (ended.state, ended.reason) == ("failed", "its client ended without giving it back")


def test_a_client_that_falls_silent_loses_its_lease(start_broker):
    broker = start_broker(MILLPOND_POOL_HEARTBEAT_S="0.2", MILLPOND_POOL_GRACE_S="1")
    lease = broker.acquire()
    keep_for(lease, 1.5)
    ended = broker.wait_ended(lease.granted.lease, 5)
    assert ended.state == "expired"
    assert "nothing was heard of its client" in ended.reason
    assert "nothing was heard" in wait_lost(lease)
    lease.release()


def test_an_idle_lease_expires(start_broker):
    broker = start_broker("idles:8", MILLPOND_POOL_IDLE_LIMIT_S="0.3")
    lease = broker.acquire()
    assert "it was idle for" in wait_lost(lease)
    assert broker.wait_ended(lease.granted.lease).state == "expired"
    lease.release()


def test_one_who_waits_is_served_when_the_other_hangs_up(broker):
    first = broker.acquire()
    with broker.acquire("bob", wait_s=DEADLINE_S, on_wait=lambda _: first.connection.close()) as second:
        assert broker.lease_status(second.granted.lease).state == "active"


def test_one_who_hangs_up_while_waiting_is_not_served(broker):
    with broker.acquire():
        with broker.connect() as connection:
            connection.send(wire.Acquire("bob", wait_s=1e6))
            waiting, _ = connection.receive(DEADLINE_S)
        assert isinstance(waiting, wire.Waiting)
        wait_for(lambda: broker.lease_status(waiting.lease).state == "failed")


def test_one_who_hangs_up_while_its_worker_starts_leaves_nothing(broker):
    with broker.connect() as connection:
        connection.send(wire.Acquire("bob"))
    wait_for(lambda: broker.status().leases)
    assert broker.wait_ended(broker.status().leases[0].lease).state == "failed"


def test_after_a_kill_nothing_runs_and_the_past_is_known(start_broker):
    broker = start_broker()
    past = broker.acquire()
    past.release()
    broker.wait_ended(past.granted.lease)
    lease = broker.acquire()
    worker = psutil.Process(lease.granted.workers[0].pid)
    broker.kill()
    assert "is gone" in wait_lost(lease)
    lease.release()
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 5)
    again = start_broker()
    assert (again.lease_status(past.granted.lease).state) == "released"
    failed = again.lease_status(lease.granted.lease)
    assert (failed.state, failed.reason) == ("failed", "the broker ended")
    with again.acquire():
        pass


def test_sigterm_ends_the_workers_and_tells_the_clients(broker):
    lease = broker.acquire()
    workers = broker.workers()
    started = time.monotonic()
    broker.close()
    assert time.monotonic() - started < 4
    assert broker.process.returncode == 0
    assert "the broker was stopped" in wait_lost(lease)
    lease.release()
    assert not psutil.wait_procs(workers, 1)[1]
    assert "Traceback" not in broker.log.read_text()


def test_a_stopped_and_continued_broker_does_not_blame_its_clients(start_broker):
    broker = start_broker(MILLPOND_POOL_HEARTBEAT_S="0.2", MILLPOND_POOL_GRACE_S="2")
    settings = load(PoolSettings, {**broker.environ, "MILLPOND_POOL_GRACE_S": "60"})
    lease = Lease.acquire(settings, "ann")
    broker.process.send_signal(signal.SIGSTOP)
    keep_for(lease, 2.5)
    broker.process.send_signal(signal.SIGCONT)
    keep_for(lease, 0.5)
    assert broker.lease_status(lease.granted.lease).state == "active"
    lease.release()


def test_the_queue_is_bounded(broker):
    connections = [broker.connect() for _ in range(MAX_PENDING + 2)]
    for connection in connections:
        connection.send(wire.Acquire("ann", wait_s=1e6))
    refused, _ = next(c for c in connections[::-1]).receive(DEADLINE_S)
    assert isinstance(refused, wire.Refused)
    assert "wait already" in refused.message
    for connection in connections:
        connection.close()
    wait_for(lambda: not broker.workers())


def serve(broker: BrokerProcess, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "millpond", "pool", "serve", *options]
    environ = {**broker.environ, **environ}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_a_second_broker_with_the_same_records_is_refused(broker):
    refused = serve(broker, "--port", "0")
    assert refused.returncode == 2
    assert "Another broker runs" in refused.stderr


def test_a_port_in_use_is_a_clear_error(broker, tmp_path):
    refused = serve(broker, "--port", str(broker.port), MILLPOND_HOME=str(tmp_path / "other"))
    assert refused.returncode == 2
    assert f"cannot listen on 127.0.0.1:{broker.port}" in refused.stderr


def test_beyond_loopback_a_token_is_needed(broker, tmp_path):
    refused = serve(broker, "--bind", "0.0.0.0", MILLPOND_POOL_TOKEN="", MILLPOND_HOME=str(tmp_path / "other"))
    assert refused.returncode == 2
    assert "MILLPOND_POOL_TOKEN" in refused.stderr


def test_damaged_records_are_a_clear_error(broker):
    broker.close()
    (broker.home / "state/pool/leases.json").write_text('[{"id": 1}]')
    refused = serve(broker, "--port", "0")
    assert refused.returncode == 2
    assert "move the file away" in refused.stderr


def test_no_broker_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ConnectionLost, match="millpond pool serve"):
        get_status(load(PoolSettings, {"MILLPOND_POOL_ADDRESS": "127.0.0.1:1"}))


def test_without_torch_it_says_what_to_install(broker, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(PoolError, match="pip install"):
        broker.status()


@pytest.mark.parametrize("address", ["nowhere", ":7070", "host:", "host:99999", "host:७"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(SettingsError, match="not host:port"):
        get_status(load(PoolSettings, {"MILLPOND_POOL_ADDRESS": address}))


def test_a_limit_below_two_heartbeats_is_refused():
    with pytest.raises(SettingsError, match="at least twice"):
        Lease.acquire(load(PoolSettings, {"MILLPOND_POOL_GRACE_S": "3"}), "ann")


@pytest.mark.slow
def test_a_real_worker_serves_a_real_lease(tmp_path):
    broker = BrokerProcess(tmp_path / "pool", MILLPOND_POOL_MEMORY="1GiB")
    try:
        with broker.acquire() as lease:
            (worker,) = lease.granted.workers
            connection, welcome = connect_raw(
                worker.host, worker.port, worker.token, "2.13", sends="to-worker", receives="from-worker"
            )
            with connection:
                assert welcome.memory_bytes == GIB
                connection.send(wire.Attach(b"a session that is ours"))
                connection.send(wire.Batch([wire.Synchronize()]))
                assert connection.receive(DEADLINE_S)[0] == wire.Done()
        broker.wait_ended(lease.granted.lease)
    finally:
        broker.close()
