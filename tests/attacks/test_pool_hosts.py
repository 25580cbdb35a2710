"""Hostile hosts, and clients that pose as some: the broker stays, and so does the lease of a good client."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import msgspec
import psutil
import pytest

from millpond.pool import joined, wire
from millpond.pool.lease import Lease
from pool_site import DEADLINE_S, GIB, BrokerProcess, frame, greet, is_hung_up, wait_for

FLAT_BYTES = 16 * 2**20
SESSION = b"what eve's host calls its part"
DEVICE = wire.HostDevice("GPU", "cuda:0", 8 * GIB)
REPORT = wire.WorkerReport(0, 1, 7071, 0, 0, 0.0)


@pytest.fixture(scope="module")
def broker(tmp_path_factory) -> Iterator[BrokerProcess]:
    started = BrokerProcess(tmp_path_factory.mktemp("pool") / "pool", "serves:4", MILLPOND_POOL_GRACE_S="60")
    yield started
    started.close()


@pytest.fixture(autouse=True)
def unharmed(broker) -> Iterator[Lease]:
    """Hold a lease on the broker's own device during the attack."""
    process = psutil.Process(broker.process.pid)
    with broker.acquire("ann", memory_bytes=4 * GIB, wait_s=DEADLINE_S) as lease:
        before = process.memory_info().rss
        yield lease
        assert lease.keep() == ""
        assert broker.lease_status(lease.granted.lease).state == "active"
        assert process.memory_info().rss - before < FLAT_BYTES
        wait_for(lambda: len(broker.status().devices) == 1)
    assert "Traceback" not in broker.log.read_text()


def read(sock, direction: wire.Direction = "to-host") -> wire.Message:
    header_bytes, _ = wire.measure(sock.recv(wire.PREFIX.size, socket.MSG_WAITALL))
    return wire.decode(sock.recv(header_bytes, socket.MSG_WAITALL), direction)


@contextlib.contextmanager
def joined_host(broker: BrokerProcess, name: str = "eve") -> Iterator:
    with greet(broker) as sock:
        sock.sendall(wire.encode(wire.Join(name, [DEVICE], SESSION)))
        assert isinstance(read(sock), wire.Joined)
        yield sock
        with contextlib.suppress(OSError):
            sock.sendall(wire.encode(wire.Leave()))  # else it might come back, for three seconds


def test_a_client_can_say_nothing_that_a_host_says(broker):
    for message in (REPORT, wire.WorkerEnded(0, "gone"), wire.StartWorker(0, "lease-1", "cpu", 1, "t", "", 30.0)):
        with greet(broker) as sock:
            sock.sendall(wire.encode(message))
            assert is_hung_up(sock)


def test_a_host_can_say_nothing_that_a_client_says(broker):
    for message in (wire.Acquire("eve"), wire.GetStatus(), wire.Release(), wire.Join("eve", [DEVICE], SESSION)):
        with joined_host(broker) as sock:
            sock.sendall(wire.encode(message))
            assert is_hung_up(sock)
        wait_for(lambda: len(broker.status().devices) == 1)


def test_a_client_with_a_lease_cannot_become_a_host(broker):
    with greet(broker) as sock:
        sock.sendall(wire.encode(wire.Acquire("eve", wait_s=1e6)) + wire.encode(wire.Join("eve", [DEVICE], SESSION)))
        assert is_hung_up(sock)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "eve", "devices": []},
        {"name": "", "devices": [DEVICE]},
        {"name": "e" * 65, "devices": [DEVICE]},
        {"name": "eve", "devices": [DEVICE] * (wire.MAX_HOST_DEVICES + 1)},
        {"name": "eve", "devices": [{"name": "GPU", "torch_name": "cuda:0", "memory_bytes": -1}]},
        {"name": "eve", "devices": [{"name": "GPU", "torch_name": "cuda:0", "memory_bytes": 2**63}]},
        {"name": "eve", "devices": [{"name": "G" * 129, "torch_name": "cuda:0", "memory_bytes": 1}]},
        {"name": "eve", "devices": "all"},
        {"name": "eve", "devices": [DEVICE], "session": b"short"},
    ],
)
def test_an_offer_that_makes_no_sense_ends_the_connection(broker, fields):
    with greet(broker) as sock:
        sock.sendall(frame(msgspec.msgpack.encode({"type": "join", "session": SESSION, **fields})))
        assert is_hung_up(sock)


def test_a_host_cannot_take_the_name_of_the_brokers_own(broker):
    with greet(broker) as sock:
        sock.sendall(wire.encode(wire.Join(broker.status().devices[0].host, [DEVICE], SESSION)))
        refused = read(sock)
        assert isinstance(refused, wire.Refused)
        assert "is in the pool already" in refused.message


def test_a_host_is_come_back_as_only_by_who_knows_what_it_calls_its_part(broker):
    own = broker.status().devices[0].host
    with joined_host(broker) as good:
        for name, session in (("eve", b"g" * 16), ("eve", b"g" * len(SESSION)), (own, SESSION)):
            with greet(broker) as sock:
                sock.sendall(wire.encode(wire.Join(name, [DEVICE], session, resumes=True)))
                assert isinstance(read(sock), wire.Refused)
        good.sendall(wire.encode(wire.Heartbeat()))
        assert isinstance(read(good), wire.Heartbeat)


def test_workers_that_a_host_makes_up_are_ended_and_too_many_end_its_part(broker, unharmed):
    with joined_host(broker) as sock:
        sock.sendall(wire.encode(wire.Running([0, 7, 2**62])))
        assert {read(sock).worker for _ in range(3)} == {0, 7, 2**62}  # ann's may be one of them
        sock.sendall(wire.encode(wire.Running([1] * (wire.MAX_HOST_WORKERS + 1))))
        assert is_hung_up(sock)


def test_what_a_host_says_of_workers_that_are_not_its_own_is_not_heeded(broker, unharmed):
    with joined_host(broker) as sock:
        for number in range(10):  # ann's is one of them
            sock.sendall(wire.encode(wire.WorkerEnded(number, "killed")))
            sock.sendall(wire.encode(msgspec.structs.replace(REPORT, worker=number, used_bytes=2**60)))
        sock.sendall(wire.encode(wire.Heartbeat()))
        assert isinstance(read(sock), wire.Heartbeat)
        assert broker.lease_status(unharmed.granted.lease).used_bytes < 2**60


def test_a_host_that_sends_nonsense_about_its_worker_is_lost_and_named(broker):
    with joined_host(broker) as sock, greet(broker) as client:
        client.sendall(wire.encode(wire.Acquire("bob", memory_bytes=8 * GIB)))
        start = read(sock)
        assert isinstance(start, wire.StartWorker)
        assert start.device == "cuda:0"
        nonsense = {"type": "worker-report", "worker": start.worker, "pid": 1, "port": 0}
        sock.sendall(frame(msgspec.msgpack.encode(nonsense)))
        assert is_hung_up(sock)
        ended = read(client, "from-broker")
        assert isinstance(ended, wire.LeaseEnded)
        assert "is lost with its host eve: it sent what it may not" in ended.reason


def test_hosts_that_come_and_go_by_the_hundred_leave_nothing(broker):
    for _ in range(100):
        with joined_host(broker):
            pass
        wait_for(lambda: len(broker.status().devices) == 1)


def test_a_host_that_starts_no_worker_is_given_up_on(monkeypatch):
    class Writer:
        def get_extra_info(self, end: str) -> tuple[str, int]:
            return {"peername": ("192.0.2.7", 1), "sockname": ("192.0.2.1", 7070)}[end]

        def is_closing(self) -> bool:
            return False

        def write(self, data: bytes) -> None:
            sent.append(wire.decode(data[wire.PREFIX.size :], "to-host"))

    sent: list[wire.Message] = []
    monkeypatch.setattr(joined, "START_S", 0.1)
    monkeypatch.setattr(joined, "MARGIN_S", 0.1)
    monkeypatch.setattr(joined, "SILENT_WORKER_S", 0.1)

    async def run(reports: int) -> str:
        host = joined.JoinedHost("gpu-2", SESSION, Writer(), 0.0)  # type: ignore[arg-type]
        heard = []
        start = wire.StartWorker(0, "lease-1", "cpu", 1, "token", "", 30.0)
        running = asyncio.create_task(host.run_worker(start, heard.append))
        await asyncio.sleep(0)
        for _ in range(reports):
            host.take(REPORT)
        why = await running
        assert len(heard) == reports
        return why

    for reports in (0, 1):
        sent.clear()
        assert asyncio.run(run(reports)) == "was not heard of for 0.2 s, though host gpu-2 is well"
        assert [type(message) for message in sent] == [wire.StartWorker, wire.EndWorker]
