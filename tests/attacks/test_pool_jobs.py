"""Hostile clients of a job's worker, hostile jobs, and hostile hosts: data goes in and out, and nothing else does."""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import pytest

from millpond.pool import job, transport, wire
from millpond.pool.errors import PoolError
from millpond.pool.lease import Lease
from pool_site import BrokerProcess, frame, is_hung_up, wait_for
from ray_site import RAY_TOKEN, RayStandIn, paddle_stand_in

MIB = 2**20
MOST_BYTES = 8 * MIB
FLAT_BYTES = 64 * MIB


@pytest.fixture(scope="module")
def ray() -> Iterator[RayStandIn]:
    with contextlib.closing(RayStandIn()) as started:
        yield started


@pytest.fixture(scope="module")
def site(ray: RayStandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    directory = tmp_path_factory.mktemp("pool")
    environ = {
        "MILLPOND_POOL_RAY_ADDRESS": ray.address,
        "MILLPOND_POOL_RAY_TOKEN": RAY_TOKEN,
        "MILLPOND_POOL_PADDLE_PYTHON": str(paddle_stand_in(directory)),
        "MILLPOND_POOL_JOB_BYTES": str(MOST_BYTES),
        "MILLPOND_POOL_MEMORY": "2GiB",
    }
    with contextlib.closing(BrokerProcess(directory / "pool", **environ)) as started:
        yield started


@pytest.fixture
def lease(site: BrokerProcess, ray: RayStandIn) -> Iterator[Lease]:
    """A lease for a job; afterwards nothing is left of it, and what a worker says is no traceback."""
    with site.acquire(job=True, wait_s=20) as taken:
        yield taken
        (worker,) = site.workers()
        assert worker.memory_info().rss < 256 * MIB
    site.wait_ended(taken.granted.lease)
    wait_for(lambda: not ray.runs() and not files(site))
    assert "Traceback" not in site.log.read_text()


@pytest.fixture
def dial(lease: Lease) -> Iterator[Callable[..., transport.Connection]]:
    """Have connections to the job's worker, in a session of their own."""
    with contextlib.ExitStack() as stack:

        def dial(token: str = "", *, attaches: bool = True) -> transport.Connection:
            (worker,) = lease.granted.workers
            connection, _ = transport.connect(
                worker.host, worker.port, token or worker.token, "2.13", sends="to-job", receives="from-job"
            )
            stack.enter_context(connection)
            if attaches:
                connection.send(wire.Attach(secrets.token_bytes(16)))
            return connection

        yield dial


def files(site: BrokerProcess) -> list[Path]:
    return list((site.home / "state/pool/jobs").glob("job-*"))


def refusal(connection: transport.Connection) -> str:
    """Return why the worker refuses to go on."""
    while not isinstance((message := connection.receive(20)[0]), wire.Refused):
        pass
    assert is_hung_up(connection.socket)
    return message.message


def job_of(what: dict[str, object]) -> bytes:
    return json.dumps(what).encode()


@pytest.mark.parametrize(
    "name", ["../job.json", "/etc/passwd", "socket", "", "trained.safetensors", "train-ids.npy\0", "x" * 5000]
)
def test_a_client_names_no_path(name, dial, site):
    connection = dial()
    connection.socket.sendall(frame(msgspec.msgpack.encode({"type": "write-file", "file": name, "offset": 0})))
    assert "not a to-job message" in refusal(connection)
    assert [list(work.iterdir()) for work in files(site)] == [[]]


@pytest.mark.parametrize("name", ["../leases.json", "job.json", "weights.safetensors", "socket"])
def test_a_client_reads_and_deletes_only_what_comes_of_a_job(name, dial):
    for message in (
        {"type": "read-file", "file": name, "offset": 0, "length": 9},
        {"type": "drop-file", "file": name},
    ):
        connection = dial()
        connection.socket.sendall(frame(msgspec.msgpack.encode(message)))
        assert "not a to-job message" in refusal(connection)


def test_what_reads_make_no_sense_get_nothing(dial, site):
    connection = dial()
    (work,) = files(site)
    (work / "trained.safetensors").symlink_to("/etc/passwd")
    connection.send(wire.ReadFile("checkpoint.safetensors", 2**62, 1))
    assert connection.receive(20) == (wire.FilePart(0), memoryview(b""))
    connection.send(wire.ReadFile("trained.safetensors", 0, 64))
    assert "Too many levels of symbolic links" in refusal(connection)


def test_files_are_written_from_their_beginning_to_their_end(dial):
    for offset in (1, 2**62):
        connection = dial()
        connection.send(wire.WriteFile("job.json", offset), b"{}")
        assert f"job.json has 0 bytes, and is to go on at {offset}" in refusal(connection)


def test_a_job_takes_no_more_room_than_its_host_gives(dial, site):
    connection = dial()
    for number, name in enumerate(("weights.safetensors", "train-ids.npy", "job.json")):
        with contextlib.suppress(PoolError):
            connection.send(wire.WriteFile(name, 0), b"w" * (MOST_BYTES // 2 + (number == 2)))
    assert "larger than its host allows" in refusal(connection)
    assert sum(path.stat().st_size for work in files(site) for path in work.iterdir()) <= MOST_BYTES


def test_a_worker_of_a_job_takes_nothing_of_torch_and_that_of_torch_no_job(dial, lease):
    for message in (wire.Batch([wire.Seed(wire.BigInt("1"))]), wire.Acquire("eve"), wire.EndWorker(0)):
        connection = dial()
        connection.socket.sendall(wire.encode(message))
        assert "not a to-job message" in refusal(connection)


def test_a_lease_has_one_job_and_its_files_do_not_change_under_it(dial, ray):
    before = len(ray.submitted)
    connection = dial()
    connection.send(wire.WriteFile("job.json", 0), job_of({}))
    connection.send(wire.StartJob())
    connection.send(wire.WriteFile("train-ids.npy", 0), b"n")
    assert "files are written before it starts" in refusal(connection)
    wait_for(lambda: not ray.runs())
    connection = dial()
    connection.send(wire.StartJob())
    assert "a lease has one job" in refusal(connection)
    assert len(ray.submitted) == before + 1


def test_whoever_does_not_know_the_leases_token_has_no_job(dial):
    with pytest.raises(PoolError, match="token is wrong"):
        dial("another", attaches=False)


def test_a_second_session_waits_for_nobody(dial):
    first = dial()
    first.send(wire.WriteFile("job.json", 0), b"{}")
    assert "has 1 sessions already" in refusal(dial())


def test_a_job_that_floods_is_ended(dial, ray):
    connection = dial()
    connection.send(wire.WriteFile("job.json", 0), job_of({"floods": True}))
    connection.send(wire.StartJob())
    assert "says a line that does not end" in refusal(connection)
    wait_for(lambda: not ray.runs())


def test_a_job_that_says_more_than_anyone_reads_waits(dial, site, ray):
    connection = dial()
    connection.send(wire.WriteFile("job.json", 0), job_of({"says": ("x" * 1000 + "\n") * 7_000}))
    connection.send(wire.StartJob())
    wait_for(lambda: ray.runs())
    (worker,) = site.workers()
    before = worker.memory_info().rss
    for _ in range(100):
        assert isinstance(connection.receive(20)[0], wire.JobLine | wire.Received)
    assert worker.memory_info().rss - before < FLAT_BYTES


Answers = Callable[[wire.Message], Iterable[tuple[wire.Message, bytes]]]


class HostileWorker:
    """Poses as the worker of a job."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(PoolError, OSError):
            sock, _ = self._listener.accept()
            connection, _ = transport.accept(sock, "token", "2.13", sends="from-job", receives="to-job", device="cpu")
            with connection:
                connection.receive(20)
                while True:
                    message, _ = connection.receive(20)
                    if isinstance(message, wire.EndSession):
                        return
                    if not isinstance(message, wire.Received):
                        for answer in self._answers(message):
                            connection.send(*answer)

    def close(self) -> None:
        self._listener.close()
        self._thread.join(20)


class Kept:
    """Stands in for a lease that stands."""

    settings = None

    def __init__(self, port: int) -> None:
        self.granted = wire.Granted("lease-1", [wire.WorkerAddress("127.0.0.1", port, "token", 1, "CPU\x1b[2J", 1)])

    def keep(self) -> str:
        return ""


@contextlib.contextmanager
def job_at(monkeypatch, tmp_path: Path, answers: Answers):
    monkeypatch.setattr(job.tls, "caller", lambda settings: None)
    monkeypatch.setattr(job, "LAST_WORD_S", 0.0)
    with contextlib.closing(HostileWorker(answers)) as hostile, job._Line(Kept(hostile.port)) as line:  # type: ignore[arg-type]
        yield job.Job(line, tmp_path)


@pytest.mark.parametrize(
    ("total", "content"), [(0, b""), (9, b""), (9, b"x" * 10), (2**62, b"x"), (101, b"x" * 101), (9, b"xx")]
)
def test_a_host_sends_no_file_but_one_of_the_size_that_it_should_have(total, content, monkeypatch, tmp_path):
    def answers(message: wire.Message) -> list[tuple[wire.Message, bytes]]:
        assert isinstance(message, wire.ReadFile)
        return [(wire.FilePart(total), content if message.offset == 0 else b"x" * 64)]

    with job_at(monkeypatch, tmp_path, answers) as started, pytest.raises(PoolError):
        started.fetch("trained.safetensors", 100)


def test_what_a_host_says_moves_no_cursor_and_ends_once(monkeypatch, tmp_path):
    (tmp_path / "job.json").write_text("{}")
    with job_at(monkeypatch, tmp_path, lambda message: [(wire.JobEnded("\x1b]0;owned\x07"), b"")]) as started:
        started.start()
        assert started.where == "the pool's CPU [2J"
        assert [started.readline(), started.readline()] == [b"", b""]
        assert started.why_ended() == " ]0;owned "


def test_an_answer_that_nobody_asked_for_ends_it(monkeypatch, tmp_path):
    (tmp_path / "job.json").write_text("{}")
    with job_at(monkeypatch, tmp_path, lambda message: [(wire.FilePart(3), b"abc")]) as started:
        with contextlib.suppress(PoolError):
            started.start()
        assert started.readline() == b""
        assert "answers what was not asked" in started.why_ended()


def test_a_host_that_floods_while_a_file_is_fetched_fills_no_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(job, "MAX_UNREAD_BYTES", 10 * MIB)
    flood = itertools.repeat((wire.JobLine(), b"x" * MIB))
    with job_at(monkeypatch, tmp_path, lambda message: flood) as started:
        with pytest.raises(PoolError, match="more than can be read while a file"):
            started.fetch("trained.safetensors", 100)
        assert started._line._unread_bytes <= 12 * MIB
