"""Hostile captured graphs: refused at once or with the session, and no other session sees anything of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from millpond.pool import wire
from millpond.pool.transport import Connection
from worker_site import GIB, WorkerProcess

EIGHT = wire.Geometry("uint8", (8,), (1,))
BIG = 2**26
ADD, COPY, ONES = 0, 1, 2
"""Plans of every session here: an addition, a copy, 64 MiB of ones."""


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    started = WorkerProcess(GIB, log=tmp_path_factory.mktemp("worker") / "worker.log")
    yield started
    started.close()
    log: Path = started.log
    assert "Traceback" not in log.read_text()


@pytest.fixture
def session(worker: WorkerProcess) -> Iterator[Connection]:
    """A session with the three plans and the bytes 0 to 7 under handle 1."""
    with worker.connect() as connection:
        two = [wire.Operand(0), wire.Operand(1)]
        ones = wire.Define(
            ONES,
            "aten::ones",
            [[BIG]],
            {"dtype": wire.Symbol("dtype", "uint8")},
            [wire.Geometry("uint8", (BIG,), (1,))],
        )
        send(
            connection,
            wire.Define(ADD, "aten::add.Tensor", two, {}, [EIGHT]),
            wire.Define(COPY, "aten::clone", [wire.Operand(0)], {}, [EIGHT]),
            ones,
            wire.Put(1, "uint8", (8,), bytes(range(8))),
        )
        yield connection


@pytest.fixture(autouse=True)
def unharmed(worker: WorkerProcess) -> Iterator[None]:
    """Keep another session with a graph of its own through the attack; it must run as before, on what it had."""
    with worker.connect() as other:
        send(other, wire.Define(ADD, "aten::add.Tensor", [wire.Operand(0), wire.Operand(1)], {}, [EIGHT]))
        send(other, wire.Put(1, "uint8", (8,), bytes(range(8))), TWICE, wire.Run(0, [1], 10))
        assert read(other, 10) == bytes(3 * value for value in range(8))
        yield
        send(other, wire.Run(0, [1], 11))
        assert read(other, 1) == bytes(range(8))
        assert read(other, 10) == read(other, 11) == bytes(3 * value for value in range(8))


def send(connection: Connection, *items: wire.Item) -> None:
    connection.send(wire.Batch(list(items)))


def graph(steps: list[wire.Step], outputs: list[int], inputs: int = 1) -> wire.DefineGraph:
    return wire.DefineGraph(0, [EIGHT] * inputs, steps, outputs)


def read(connection: Connection, handle: int) -> bytes:
    send(connection, wire.Read(handle, 0, 8))
    message, payload = connection.receive(60)
    assert isinstance(message, wire.Data), message
    return bytes(payload)


def failure(connection: Connection) -> wire.Failed:
    """Return the one thing that failed."""
    send(connection, wire.Synchronize())
    message, _ = connection.receive(20)
    assert isinstance(message, wire.Failed), message
    assert isinstance(connection.receive(20)[0], wire.Done)
    return message


def ending(connection: Connection) -> str:
    message, _ = connection.receive(20)
    assert isinstance(message, wire.Refused), message
    return message.message


def used(connection: Connection) -> int:
    send(connection, wire.GetUsage())
    message, _ = connection.receive(10)
    assert isinstance(message, wire.Usage)
    return message.used_bytes


TWICE = graph([wire.Step(ADD, [0, 0]), wire.Step(ADD, [1, 0])], [2])


def test_a_graph_runs_again_and_again_and_keeps_only_its_outputs(session):
    send(session, TWICE, wire.Run(0, [1], 10))
    before = used(session)
    for handle in range(10, 40):
        send(session, wire.Run(0, [1], handle))
        assert read(session, handle) == bytes(3 * value for value in range(8))
        send(session, wire.Free([handle]))
    assert used(session) == before - 8


@pytest.mark.parametrize(
    ("define", "why"),
    [
        (graph([wire.Step(ADD, [0, 1])], [1]), "only a later one makes"),  # itself
        (graph([wire.Step(ADD, [0, 2]), wire.Step(ADD, [0, 1])], [2]), "only a later one makes"),  # a cycle
        (graph([wire.Step(ADD, [0, 2**62])], [1]), "only a later one makes"),
        (graph([wire.Step(ADD, [0])], [1]), "too few operands"),
        (graph([wire.Step(77, [0])], [1]), "never defined"),
        (graph([wire.Step(COPY, [0])], [2]), "that a step made"),
        (graph([wire.Step(COPY, [0])], [0]), "that a step made"),  # an input under a second handle
        (graph([wire.Step(COPY, [0])], [1, 1]), "that a step made"),
        (graph([wire.Step(COPY, [0], [], [wire.Geometry("uint8", (2**62, 2**62), (1, 1))])], [1]), "no tensor's"),
        (wire.DefineGraph(0, [wire.Geometry("no such dtype", (8,), (1,))], [], []), "is no dtype"),
        (wire.Run(5, [], 1), "never defined"),
    ],
)
def test_a_graph_that_is_none_ends_the_session_and_says_why(session, define, why):
    send(session, define)
    assert why in ending(session)


@pytest.mark.parametrize("operands", [[], [1, 1]])
def test_a_run_with_the_wrong_number_of_inputs_ends_the_session(session, operands):
    send(session, TWICE, wire.Run(0, operands, 10))
    assert "inputs; it has 1" in ending(session)


def test_an_op_off_the_list_is_refused_and_so_is_the_graph_with_it(session):
    send(session, wire.Define(9, "aten::set_.source_Tensor", [wire.Operand(0), wire.Operand(0)], {}, []))
    assert failure(session).kind == "refused"
    send(session, graph([wire.Step(9, [0])], []), wire.Run(0, [1], 10), wire.Read(1, 0, 8))
    assert isinstance(session.receive(10)[0], wire.Data)  # what follows from a failure is not reported again


def test_a_graph_and_a_handle_of_another_session_are_not_this_ones(worker, session):
    send(session, TWICE)
    with worker.connect() as other:
        send(other, wire.Run(0, [1], 10))
        assert "never defined" in ending(other)
    with worker.connect() as other:
        send(other, wire.Define(COPY, "aten::clone", [wire.Operand(0)], {}, [EIGHT]))
        send(other, graph([wire.Step(COPY, [0])], [1]), wire.Run(0, [1], 10))
        assert "no tensor of this session" in failure(other).message
    assert read(session, 1) == bytes(range(8))


def test_an_input_that_is_not_what_was_declared_is_refused(session):
    send(session, TWICE, wire.Put(2, "float32", (2,), bytes(8)), wire.Run(0, [2], 10))
    failed = failure(session)
    assert failed.kind == "refused"
    assert "input 0 of a graph" in failed.message
    send(session, wire.Run(0, [1], 11))
    assert read(session, 11) == bytes(3 * value for value in range(8))


def test_a_graph_that_lives_within_the_lease_is_run_and_one_that_does_not_is_refused(session):
    dying = [wire.Step(ONES, []) for _ in range(40)]  # each is dropped at once
    send(session, graph(dying, [1]), wire.Run(0, [1], 10), wire.Free([10]))
    assert read(session, 1) == bytes(range(8))
    before = used(session)
    send(session, graph(dying, list(range(1, 41))), wire.Run(0, [1], 10))
    failed = failure(session)
    assert failed.kind == "memory"
    assert used(session) == before


def test_a_liar_about_a_step_is_told_and_gets_nothing(session):
    send(session, graph([wire.Step(COPY, [0], [], [wire.Geometry("uint8", (4,), (1,))])], [1]), wire.Run(0, [1], 10))
    assert failure(session).kind == "geometry"


@pytest.mark.parametrize(
    "item",
    [
        ["define-graph", wire.MAX_GRAPHS, [], [], []],
        ["define-graph", 0, [], [["step", 0, [0], []]] * (wire.MAX_GRAPH_STEPS + 1), []],
        ["define-graph", 0, [], [["call", 0, [0], 1]], []],
        ["define-graph", 0, [], [["step", 0, [-1], []]], []],
        ["run", 0, [2**63], 1],
    ],
    ids=["number", "steps", "a call within", "a place", "a handle"],
)
def test_a_malformed_or_too_large_graph_ends_the_session(worker, item):
    with worker.connect() as connection:
        header = msgspec.msgpack.encode({"type": "batch", "items": [item]})
        connection.socket.sendall(wire.PREFIX.pack(len(header), 0) + header)
        assert "not a to-worker message" in ending(connection)
