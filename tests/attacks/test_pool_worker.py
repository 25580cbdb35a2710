"""Hostile clients of a worker, with and without its token: clear errors, nothing dies, memory does not grow."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import random
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from attacks.test_pool_confined import kernel_has_landlock
from millpond.pool import handshake, wire
from millpond.pool.errors import AuthenticationError, ConnectionLost, PoolError, VersionMismatch, WireError
from millpond.pool.transport import Connection
from millpond.pool.worker import MAX_SESSIONS
from pool_site import wait_for
from worker_site import GIB, TOKEN, WorkerProcess

ONE = wire.Operand(0)
TABLE = wire.Operand(0, wire.View("uint8", (4, 2), (2, 1), 0))
FACTORY = {"dtype": wire.Symbol("dtype", "uint8"), "device": wire.Symbol("device")}
FLAT_BYTES = 48 * 2**20
"""An attack may make the worker larger by no more than this (threads' stacks and allocators' arenas are kept)."""


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    started = WorkerProcess(GIB, log=tmp_path_factory.mktemp("worker") / "worker.log")
    with started.connect() as warm:  # what is loaded at first use is no growth
        define(warm, 0, "aten::add.Tensor", [wire.Operand(0), wire.Operand(0)])
        put(warm, 1)
        assert read(warm, 1) == bytes(range(8))
    yield started
    started.close()


@pytest.fixture(autouse=True)
def unharmed(worker: WorkerProcess) -> Iterator[Connection]:
    """Keep a good client's session through the attack; it and its tensor must be untouched after."""
    process = psutil.Process(worker.process.pid)
    with worker.connect() as good:
        put(good, 7)
        assert read(good, 7) == bytes(range(8))
        before = process.memory_info().rss
        yield good
        assert read(good, 7) == bytes(range(8))
        wait_for(lambda: process.memory_info().rss - before < FLAT_BYTES)  # a session that ended is freed soon
    assert "Traceback" not in worker.log.read_text()


def batch(connection: Connection, *items: wire.Item, payload: bytes = b"") -> None:
    connection.send(wire.Batch(list(items)), payload)


def put(connection: Connection, handle: int) -> None:
    """Make a tensor of the bytes 0 to 7."""
    batch(connection, wire.Put(handle, "uint8", (8,), bytes(range(8))))


def define(connection: Connection, plan: int, op: str, arguments: list[object], results: int = 0) -> None:
    batch(connection, wire.Define(plan, op, arguments, {}, [wire.Geometry("uint8", (8,), (1,))] * results))


def read(connection: Connection, handle: int, offset: int = 0, length: int = 8) -> bytes:
    """Return a tensor's bytes; what failed is an error."""
    batch(connection, wire.Read(handle, offset, length))
    while True:
        message, payload = connection.receive(10)
        if isinstance(message, wire.Failed):
            if message.answer:
                raise LookupError(message.kind, message.message)
        else:
            assert isinstance(message, wire.Data), message
            return bytes(payload)


def failure(connection: Connection) -> wire.Failed:
    """Return what the worker reports next."""
    batch(connection, wire.Synchronize())
    message, _ = connection.receive(10)
    assert isinstance(message, wire.Failed), message
    assert isinstance(connection.receive(10)[0], wire.Done)
    return message


def ending(connection: Connection) -> str:
    """Return why the worker ends the session."""
    with connection:
        message, _ = connection.receive(10)
        assert isinstance(message, wire.Refused), message
        with pytest.raises(ConnectionLost):
            connection.receive(10)
    return message.message


def test_a_worker_is_confined(worker):
    """See test_pool_confined.py for what that means."""
    process = psutil.Process(worker.process.pid)
    assert process.rlimit(resource.RLIMIT_CORE) == (0, 0)
    assert "NoNewPrivs:\t1\n" in Path(f"/proc/{process.pid}/status").read_text()
    assert "Landlock" not in worker.log.read_text() or not kernel_has_landlock()


# --- without the token ---------------------------------------------------------------------------------------------

RAW = {
    "nothing": b"",
    "one byte": b"\x00",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a pickle": pickle.dumps(os.system),
    "a pickle that runs a command": b"cos\nsystem\n(S'touch /tmp/owned'\ntR.",
    "a huge message": wire.PREFIX.pack(2**32 - 1, 0),
    "a huge payload": wire.PREFIX.pack(10, 2**64 - 1) + b"x" * 10,
    "a message of nothing": wire.PREFIX.pack(0, 0),
    "half a message": wire.PREFIX.pack(100, 0) + b"\x81",
    "no messagepack": wire.PREFIX.pack(4, 0) + b"\xc1\xc1\xc1\xc1",
    "deep nesting": wire.PREFIX.pack(4000, 0) + b"\x91" * 4000,
    "an unknown message": wire.PREFIX.pack(13, 0) + msgspec.msgpack.encode({"type": "rooted"}),
    "a batch before the greeting": wire.encode(wire.Batch([wire.Synchronize()])),
    "a wrong proof": wire.encode(wire.Hello(wire.PROTOCOL, "2.13", b"n" * 32, b"p" * 32)),
    "random": random.Random(1).randbytes(5000),
}


@pytest.mark.parametrize("what", RAW)
def test_a_stranger_gets_nowhere(worker, what):
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", worker.port), timeout=15) as sock:
            received = bytearray()
            with contextlib.suppress(OSError):  # it may have hung up on us already
                sock.sendall(RAW[what])
                sock.shutdown(socket.SHUT_WR)
                while chunk := sock.recv(4096):
                    received += chunk
            assert b"welcome" not in received
    assert not Path("/tmp/owned").exists()


def test_a_wrong_token_is_refused_and_said_so(worker):
    with pytest.raises(AuthenticationError, match="the token is wrong"):
        worker.connect("guess")


def test_a_recorded_greeting_is_worth_nothing(worker):
    with socket.create_connection(("127.0.0.1", worker.port)) as sock:
        connection = Connection(sock, sends="to-worker", receives="from-worker")
        first, _ = connection.receive(10, direction="greeting")
        recorded = handshake.answer(first, TOKEN, "2.13")
        connection.send(recorded)
        assert isinstance(connection.receive(10, direction="greeting")[0], wire.Welcome)
    with socket.create_connection(("127.0.0.1", worker.port)) as sock:
        connection = Connection(sock, sends="to-worker", receives="from-worker")
        connection.receive(10, direction="greeting")
        connection.send(recorded)
        refused, _ = connection.receive(10, direction="greeting")
    assert isinstance(refused, wire.Refused)
    assert refused.code == "token"


def test_a_torch_that_does_not_fit_is_told_what_to_install(worker):
    with socket.create_connection(("127.0.0.1", worker.port)) as sock:
        connection = Connection(sock, sends="to-worker", receives="from-worker")
        opening, _ = connection.receive(10, direction="greeting")
        hello = handshake.answer(opening, TOKEN, "1.13.1")
        connection.send(hello)
        refused, _ = connection.receive(10, direction="greeting")
    with pytest.raises(VersionMismatch, match=r"pip install 'torch>=2.11'"):
        handshake.confirm(opening, hello, refused, TOKEN)


def test_a_thousand_half_open_connections_keep_no_one_out(worker):
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(socket.create_connection(("127.0.0.1", worker.port), timeout=15))
        with worker.connect() as connection:
            put(connection, 1)
            assert read(connection, 1) == bytes(range(8))


# --- with the token: a client that means harm ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "op",
    [
        "aten::from_file", "aten::_print", "aten::record_stream", "aten::set_.source_Tensor", "aten::resize_",
        "aten::_assert_async", "aten::fbgemm_linear_int8_weight", "aten::_efficientzerotensor", "aten::set_data",
        "os::system", "aten::", "aten::add.__class__", "aten::__class__", "aten::add.Tensor.__init__", "prims::add",
        "aten::_reshape_alias", "aten::as_strided", "aten::t_", "aten::_lazy_clone", "aten::reshape", "aten::gru.input",
        "aten::quantize_per_tensor", "aten::sparse_coo_tensor.indices", "aten::_copy_from", "aten::cudnn_convolution",
        "aten::_foreach_add.List_out", "profiler::_record_function_enter",
        "c10d::barrier", "quantized::linear_prepack", "x" * 128, "",
    ],
)  # fmt: skip
def test_an_op_that_is_not_on_the_list_is_refused(worker, op):
    with worker.connect() as connection:
        define(connection, 0, op, [])
        failed = failure(connection)
        assert failed.kind == "refused"
        assert "is not an op that the pool runs" in failed.message


def test_a_handle_of_another_session_is_no_handle(worker, unharmed):
    with worker.connect() as connection:
        with pytest.raises(LookupError, match="handle 7 is no tensor of this session"):
            read(connection, 7)
        batch(connection, wire.Free([7]))
        batch(connection, wire.Write(7, 0), payload=b"overwritten")
        assert failure(connection).kind == "refused"
    assert read(unharmed, 7) == bytes(range(8))


def test_a_session_that_another_has_cannot_be_begun_again_nor_attached_to_twice(worker):
    name = b"s" * 16
    first, again = worker.dial(), worker.dial()
    with first, again:
        first.send(wire.Attach(name))
        put(first, 1)
        batch(first, wire.Synchronize())
        while not isinstance(first.receive(10)[0], wire.Done):
            continue
        again.send(wire.Attach(name))
        message, _ = again.receive(10)
        assert isinstance(message, wire.Refused)
        assert "has begun already" in message.message
        first.send(wire.Attach(b"t" * 16))
        while not isinstance(message := first.receive(10)[0], wire.Refused):
            continue
        assert "once a connection" in message.message


def test_a_session_is_not_gone_on_with_by_who_guesses_its_name(worker):
    for _ in range(20):
        with worker.dial() as connection:
            connection.send(wire.Attach(random.randbytes(16), resumes=True))
            message, _ = connection.receive(10)
            assert isinstance(message, wire.Refused)
            assert "has ended" in message.message


@pytest.mark.parametrize(
    "view",
    [
        wire.View("uint8", (9,), (1,), 0),
        wire.View("uint8", (1,), (1,), 8),
        wire.View("uint8", (2,), (8,), 0),
        wire.View("float64", (2,), (1,), 0),
        wire.View("uint8", (2,), (2**62,), 0),
        wire.View("uint8", (2**48,), (1,), 2**62),
    ],
)
def test_a_view_beyond_its_storage_is_refused(worker, view):
    with worker.connect() as connection:
        put(connection, 1)
        define(connection, 0, "aten::clone", [wire.Operand(0, view)], results=1)
        batch(connection, wire.Call(0, [1], 2))
        failed = failure(connection)
        assert failed.kind == "refused"
        assert "reaches beyond its storage" in failed.message


def test_sizes_that_overflow_end_the_session(worker):
    connection = worker.connect()
    define(connection, 0, "aten::clone", [wire.Operand(0, wire.View("uint8", (2**62, 2**62), (0, 0), 0))])
    assert "no tensor's" in ending(connection)


@pytest.mark.parametrize(
    ("item", "why"),
    [
        (wire.Call(9, [], 1), "never defined"),
        (wire.Put(1, "uint8", (9,), b"x"), "1 bytes for a tensor"),
        (wire.Put(1, "no such dtype", (1,), b"x"), "is no dtype"),
        (wire.Put(1, "quint4x2", (2, 2), b"xxxx"), "is no dtype"),  # without a quantizer, PyTorch crashes
        (wire.Put(1, "uint8", (2**62, 2**62), b""), "no tensor's"),
        (wire.Define(0, "aten::clone", [wire.Symbol("layout", "__class__")], {}, []), "is no layout"),
        (wire.Define(0, "aten::clone", [], {}, [wire.Geometry("uint8", (8,), ())]), "no tensor's"),
    ],
)
def test_nonsense_ends_the_session_and_says_why(worker, item, why):
    connection = worker.connect()
    batch(connection, item)
    assert why in ending(connection)


@pytest.mark.parametrize(
    "header",
    [
        b"\xc1",
        msgspec.msgpack.encode({"type": "batch", "items": [["call", -1, [], 0]]}),
        msgspec.msgpack.encode({"type": "batch", "items": [["call", 0, [2**63], 0]]}),
        msgspec.msgpack.encode({"type": "batch", "items": [["call", 2**40, [], 0]]}),
        msgspec.msgpack.encode({"type": "batch", "items": [["import", "os"]]}),
        msgspec.msgpack.encode({"type": "batch", "items": [["put", 0, "uint8", [1] * 65, b""]]}),
        msgspec.msgpack.encode({"type": "batch", "items": [["put", 0, "uint8", [1], b"x" * 20_000]]}),
        msgspec.msgpack.encode({"type": "batch", "items": [["synchronize"]] * (wire.MAX_ITEMS + 1)}),
        msgspec.msgpack.encode({"type": "status"}),
        pickle.dumps({"type": "batch"}),
    ],
)
def test_a_malformed_message_ends_the_session(worker, header):
    connection = worker.connect()
    connection.socket.sendall(wire.PREFIX.pack(len(header), 0) + header)
    assert "not a to-worker message" in ending(connection)


def test_a_payload_without_its_write_ends_the_session(worker):
    for items in ([], [wire.Synchronize()], [wire.Write(1, 0), wire.Write(1, 0)]):
        connection = worker.connect()
        batch(connection, *items, payload=b"12345678")
        assert "travels alone" in ending(connection)


def test_half_a_payload_of_many_clients_takes_no_memory_from_others(worker, unharmed):
    """Each holds a thread and a session of the lease, of which there are `MAX_SESSIONS`, until it hangs up."""
    wait_for(lambda: worker.next_report().sessions == 1)  # earlier tests' sessions have ended
    with contextlib.ExitStack() as stack:
        frame = wire.encode(wire.Batch([wire.Write(1, 0)]), wire.MAX_PAYLOAD_BYTES)
        for _ in range(MAX_SESSIONS - 2):
            stack.enter_context(worker.connect()).socket.sendall(frame + b"half")
        wait_for(lambda: worker.next_report().sessions == MAX_SESSIONS - 1)  # all have begun
        big = wire.Define(0, "aten::ones", [[2**29]], FACTORY, [wire.Geometry("uint8", (2**29,), (1,))])
        batch(unharmed, big, wire.Call(0, [], 1))
        assert read(unharmed, 1) == bytes([1] * 8)
        batch(unharmed, wire.Free([1]))
        last = stack.enter_context(worker.connect())
        assert read_put(last) == bytes(range(8))
        with worker.connect() as one_too_many:
            message, _ = one_too_many.receive(10)
            assert isinstance(message, wire.Refused)
            assert "sessions already" in message.message
    wait_for(lambda: worker.next_report().sessions == 1)


def read_put(connection: Connection) -> bytes:
    put(connection, 1)
    return read(connection, 1)


def test_answers_that_nobody_reads_take_no_memory(worker, unharmed):
    process = psutil.Process(worker.process.pid)
    with worker.connect() as connection:
        define = wire.Define(0, "aten::ones", [[2**26]], FACTORY, [wire.Geometry("uint8", (2**26,), (1,))])
        batch(connection, define, wire.Call(0, [], 1))
        batch(connection, wire.Synchronize())
        connection.receive(20)
        before = process.memory_info().rss
        batch(connection, *[wire.Read(1, 0, 2**26)] * 1000)
        for _ in range(20):
            assert read(unharmed, 7) == bytes(range(8))
        assert process.memory_info().rss - before < FLAT_BYTES
    wait_for(lambda: worker.next_report().sessions == 1)


def test_a_call_with_too_few_operands_ends_the_session(worker):
    connection = worker.connect()
    define(connection, 0, "aten::add.Tensor", [wire.Operand(0), wire.Operand(5)])
    batch(connection, wire.Call(0, [], 1))
    assert "too few operands" in ending(connection)


def test_writing_and_reading_beyond_a_tensor_is_refused(worker):
    with worker.connect() as connection:
        put(connection, 1)
        batch(connection, wire.Write(1, 1), payload=b"12345678")
        assert failure(connection).kind == "refused"
        for offset, length in ((1, 8), (2**62, 1), (0, wire.MAX_PAYLOAD_BYTES)):
            with pytest.raises(LookupError, match="not within"):
                read(connection, 1, offset, length)
        assert read(connection, 1) == bytes(range(8))


@pytest.mark.parametrize("believed", [1, 8])
def test_more_memory_than_the_lease_has_is_refused_whatever_the_client_believes(worker, believed):
    with worker.connect() as connection:
        geometry = wire.Geometry("uint8", (believed,), (1,))
        define = wire.Define(0, "aten::ones", [[wire.Slot(0)]], {"dtype": wire.Symbol("dtype", "uint8")}, [geometry])
        batch(connection, define)
        batch(connection, wire.Call(0, [], 1, [64 * GIB]))
        assert failure(connection).kind == "memory"


def test_a_liar_about_results_is_told_and_gets_nothing(worker):
    with worker.connect() as connection:
        put(connection, 1)
        batch(connection, wire.Define(0, "aten::clone", [wire.Operand(0)], {}, [wire.Geometry("float32", (2,), (1,))]))
        batch(connection, wire.Call(0, [1], 2))
        assert failure(connection).kind == "geometry"
        with pytest.raises(LookupError, match="geometry"):
            read(connection, 2)


def test_tensors_are_counted_until_the_lease_is_full_and_free_after(worker):
    with worker.connect() as connection:
        define = wire.Define(
            0,
            "aten::ones",
            [[2**26]],
            {"dtype": wire.Symbol("dtype", "uint8")},
            [wire.Geometry("uint8", (2**26,), (1,))],
        )
        batch(connection, define, *(wire.Call(0, [], handle) for handle in range(100, 130)))
        assert failure_kinds(connection) == {"memory"}
        batch(connection, wire.Free(list(range(100, 130))), wire.Call(0, [], 200))
        assert read(connection, 200) == bytes([1] * 8)


def test_a_session_that_takes_all_memory_leaves_the_other_what_it_has_and_the_rest_when_it_goes(worker, unharmed):
    ones = wire.Define(0, "aten::ones", [[2**26]], FACTORY, [wire.Geometry("uint8", (2**26,), (1,))])
    with worker.connect() as greedy:
        batch(greedy, ones, *(wire.Call(0, [], handle) for handle in range(100, 130)))
        assert failure_kinds(greedy) == {"memory"}
        batch(unharmed, ones, wire.Call(0, [], 1))
        assert failure(unharmed).kind == "memory"
        assert read(unharmed, 7) == bytes(range(8))
    handles = itertools.count(100)

    def gets_as_much() -> bool:
        batch(unharmed, wire.Call(0, [], next(handles)))
        return failure_kinds(unharmed) == set()

    wait_for(gets_as_much)  # the other session ends when the worker has seen that its connection is closed
    batch(unharmed, wire.Free(list(range(100, next(handles)))))


def test_a_session_that_keeps_the_device_busy_holds_up_no_other(worker, unharmed):
    size = 512
    square = wire.Geometry("float32", (size, size), (size, 1))
    kind = {"dtype": wire.Symbol("dtype", "float32"), "device": wire.Symbol("device")}
    with worker.connect() as busy:
        batch(
            busy,
            wire.Define(0, "aten::ones", [[size, size]], kind, [square]),
            wire.Define(1, "aten::mm", [wire.Operand(0), wire.Operand(0)], {}, [square]),
            wire.Call(0, [], 1),
        )
        batch(busy, wire.Synchronize())
        assert isinstance(busy.receive(20)[0], wire.Done)
        batch(busy, *[wire.Call(1, [1], 2)] * 200, wire.Synchronize())
        assert read(unharmed, 7) == bytes(range(8))
        assert not busy.has_input()  # all of it, which takes a second, would have been before


def failure_kinds(connection: Connection) -> set[str]:
    batch(connection, wire.Synchronize())
    kinds = set()
    while not isinstance(message := connection.receive(20)[0], wire.Done):
        assert isinstance(message, wire.Failed)
        kinds.add(message.kind)
    return kinds


def test_outputs_that_grow_are_counted(worker):
    with worker.connect() as connection:
        put(connection, 1)
        view, size = wire.View("uint8", (2**28,), (0,), 0), 2**28
        batch(
            connection,
            wire.Define(1, "aten::clone", [wire.Operand(0)], {}, [wire.Geometry("uint8", (8,), (1,))]),
            *(wire.Call(1, [1], handle) for handle in range(10, 16)),
            wire.Define(
                2, "aten::add.out", [wire.Operand(0, view), wire.Operand(0, view)], {"out": wire.Operand(1)}, []
            ),
            *(wire.Call(2, [1, handle], 100) for handle in range(10, 16)),
        )
        assert failure_kinds(connection) == {"memory"}
        batch(connection, wire.Free(list(range(10, 16))), wire.GetUsage())
        usage, _ = connection.receive(10)
        assert isinstance(usage, wire.Usage)
        assert usage.used_bytes < size
        assert usage.peak_bytes <= usage.limit_bytes + size


@pytest.mark.parametrize(
    "item", [wire.SetRandomState(b"short"), wire.SetRandomState(b""), wire.Seed(wire.BigInt("9" * 20))]
)
def test_a_seed_or_a_state_of_the_generator_that_is_none_is_refused(worker, item):
    with worker.connect() as connection:
        batch(connection, item)
        assert failure(connection).kind in ("runtime", "type", "value")


@pytest.mark.parametrize(
    ("define", "why"),
    [
        # PyTorch looks a number up in its own table of dtypes, unchecked.
        (wire.Define(0, "aten::ones", [[8]], {"dtype": -1}, []), "takes a dtype as dtype"),
        (wire.Define(0, "aten::ones", [[8]], {"dtype": wire.Slot(0)}, []), "takes a dtype as dtype"),
        (wire.Define(0, "aten::ones", [[8]], {"layout": 77}, []), "takes a layout as layout"),
        (wire.Define(0, "aten::sum.dim_IntList", [ONE, [0], False], {"dtype": 2**62}, []), "takes a dtype as dtype"),
        # What is not of the device, nothing would limit on a GPU's host.
        (wire.Define(0, "aten::ones", [[8]], {**FACTORY, "pin_memory": True}, []), "pinned memory"),
        (wire.Define(0, "aten::expand_copy", [wire.Slot(0, "uint8"), [2**40]], {}, []), "without an operand"),
        # Kernels that trust their arguments.
        (wire.Define(0, "aten::reflection_pad1d_backward", [ONE, ONE, []], {}, []), "two paddings"),
        (wire.Define(0, "aten::fractional_max_pool2d_backward", [ONE, ONE, [1], [], ONE], {}, []), "for each pooled"),
        (wire.Define(0, "aten::_fft_c2c", [ONE, [0, 2**31], 0, True], {}, []), "distinct dimensions"),
        (wire.Define(0, "aten::_log_softmax_backward_data", [ONE, wire.Operand(0, wire.View("uint8", (4,), (1,), 0)), 0,
                     wire.Symbol("dtype", "float32")], {}, []), "for each number"),
        (wire.Define(0, "aten::_fused_sgd_", [[ONE], [], []], {}, []), "of the same length"),
        (wire.Define(0, "aten::_fused_sgd_", [[ONE], [wire.Operand(0, wire.View("uint8", (4,), (1,), 0))], []], {}, []),
         "of the same shapes"),
        (wire.Define(0, "aten::_fused_adamw_", [[ONE], [ONE], [ONE], [ONE], [], []], {}, []), "one step number"),
        (wire.Define(0, "aten::native_batch_norm", [TABLE, None, None, None, None, False, 1, 1], {}, []), "a mean"),
        (wire.Define(0, "aten::_native_batch_norm_legit.no_stats", [ONE, None, None, True, 1, 1], {}, []), "channels"),
        (wire.Define(0, "aten::native_batch_norm_backward", [TABLE, TABLE, ONE, None, None, ONE, ONE, True, 1e-5,
                     [True, True, True]], {}, []), "one number for each channel"),
        (wire.Define(0, "aten::range.step", [0, 9, 0.5], FACTORY, []), "a step other than 0"),
    ],
)  # fmt: skip
def test_arguments_that_a_kernel_would_crash_on_are_refused(worker, define, why):
    with worker.connect() as connection:
        put(connection, 1)
        batch(connection, define, wire.Call(0, [1], 2, [1]))
        failed = failure(connection)
        assert failed.kind in ("refused", "runtime")
        assert why in failed.message


def test_an_output_that_could_not_grow_keeps_the_sizes_that_it_has_memory_for(worker):
    with worker.connect() as connection:
        put(connection, 1)
        grow = wire.Define(0, "aten::randint.out", [2, [2**38]], {"out": ONE}, [])
        look = wire.Define(1, "aten::clone", [ONE], {}, [wire.Geometry("uint8", (8,), (1,))])
        batch(connection, grow, wire.Call(0, [1], 2), look, wire.Call(1, [1], 3))
        assert failure(connection).kind == "memory"
        assert read(connection, 3) == bytes(range(8))


def test_bytes_that_random_changes_made_of_a_session_harm_no_one(worker):
    chance = random.Random(7)
    good = wire.encode(
        wire.Batch(
            [
                wire.Put(1, "uint8", (8,), bytes(8)),
                wire.Define(0, "aten::add.Tensor", [wire.Operand(0), wire.Slot(0)], {}, [None]),
                wire.Call(0, [1], 2, [1]),
                wire.Read(2, 0, 8),
                wire.Free([1, 2]),
            ]
        )
    )
    for _ in range(150):
        changed = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            changed[chance.randrange(wire.PREFIX.size, len(changed))] = chance.randrange(256)
        with worker.connect() as connection, contextlib.suppress(PoolError, TimeoutError):
            connection.socket.sendall(changed)
            batch(connection, wire.Synchronize())
            while not isinstance(connection.receive(5)[0], wire.Done):
                continue


def test_no_message_of_another_direction_is_taken():
    for message in (wire.Data(), wire.Done(), wire.GetStatus(), wire.Challenge(1, b"n" * 16)):
        with pytest.raises(WireError):
            wire.decode(wire.encode(message)[wire.PREFIX.size :], "to-worker")
