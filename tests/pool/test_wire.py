"""The wire: what is sent is what arrives, and every message has its one direction."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest

from millpond.pool import wire

ITEMS = [
    wire.Define(
        3,
        "aten::add.Tensor",
        [
            wire.Operand(0),
            wire.Operand(1, wire.View("float32", (2, 3), (1, 2), 4, True)),
            [1, None, wire.Slot(0)],
            "mean",
        ],
        {"alpha": wire.Slot(1, "int64"), "dtype": wire.Symbol("dtype", "float32"), "factor": wire.Complex(1.0, -2.0)},
        [wire.Geometry("float32", (2, 3), (3, 1)), None],
    ),
    wire.Call(3, [1, 2**62], 5, [1, 2.5, True, wire.Complex(0.0, 1.0), wire.BigInt("18446744073709551615")]),
    wire.Put(1, "uint8", (), b"\x00"),
    wire.Write(1, 64),
    wire.Free([1, 2, 3]),
    wire.Seed(wire.BigInt("7")),
    wire.SetRandomState(b"state"),
    wire.Ask(3, [1], 6),
    wire.Read(1, 0, 8),
    wire.GetRandomState(),
    wire.GetUsage(),
    wire.Synchronize(),
    wire.DefineGraph(1, [wire.Geometry("float32", (2,), (1,))], [wire.Step(3, [0], [0.5])], [1]),
    wire.Run(1, [4], 7),
    wire.Send(4, 1, b"t" * 16),
    wire.Receive(8, 0, b"t" * 16, wire.Geometry("float32", (2,), (1,))),
]
WORKER = wire.WorkerAddress("127.0.0.1", 7071, "secret", 1, "CPU", 2**30)
MESSAGES: list[tuple[wire.Message, wire.Direction]] = [
    (wire.Challenge(1, b"n" * 32), "greeting"),
    (wire.Hello(1, "2.13", b"n" * 32, b"p" * 32, "ann"), "greeting"),
    (wire.Welcome("2.13", b"p" * 32, "CPU", 2**30, 30.0), "greeting"),
    (wire.Refused("token", "no"), "greeting"),
    (wire.Attach(b"s" * 16, resumes=True, received=3), "to-worker"),
    (wire.Batch(ITEMS), "to-worker"),
    (wire.EndSession(), "to-worker"),
    (wire.Received(3), "to-worker"),
    (wire.Received(3), "from-worker"),
    (wire.Attached(3), "from-worker"),
    (wire.Data(), "from-worker"),
    (wire.Results([wire.Geometry("int64", (3,), (1,)), True, 2.5, None]), "from-worker"),
    (wire.Usage(1, 2, 3), "from-worker"),
    (wire.Done(), "from-worker"),
    (wire.Failed(4, "memory", "none left", answer=True), "from-worker"),
    (wire.Acquire("ann", 2, 2**30, 60.0), "to-broker"),
    (wire.Reattach("lease-1", "secret"), "to-broker"),
    (wire.Heartbeat(), "to-broker"),
    (wire.Release(), "to-broker"),
    (wire.GetStatus(), "to-broker"),
    (wire.Waiting("lease-1", "full"), "from-broker"),
    (wire.Granted("lease-1", [WORKER]), "from-broker"),
    (wire.LeaseEnded("lease-1", "expired", "idle"), "from-broker"),
    (wire.Status("0.1", "2.13", [wire.DeviceStatus(0, "CPU", 2, 1, "gpu-1")], []), "from-broker"),
    (wire.Attach(b"s" * 16, device=1), "to-peer"),
    (wire.Deliver(b"t" * 16, 64, 32), "to-peer"),
    (wire.Withhold(b"t" * 16, "index", "out of range"), "to-peer"),
    (wire.Attached(3), "from-peer"),
    (wire.Received(3), "from-peer"),
    (wire.Join("gpu-2", [wire.HostDevice("H100", "cuda:0", 2**36)], b"s" * 16, resumes=True), "to-broker"),
    (wire.Joined(resumed=True), "to-host"),
    (wire.StartWorker(3, "lease-1", "cuda:0", 2**36, "secret", "another", 30.0), "to-host"),
    (wire.EndWorker(3), "to-host"),
    (wire.Introduce(3, 1, [wire.PeerAddress("10.0.0.1", 7072)]), "to-host"),
    (wire.Running([3, 4]), "from-host"),
    (wire.Leave(), "from-host"),
    (wire.WorkerReport(3, 17, 7071, 7072, 5, 0.5, bytes(32)), "from-host"),
    (wire.WorkerEnded(3, "was ended by SIGKILL"), "from-host"),
]


@pytest.mark.parametrize(("message", "direction"), MESSAGES, ids=[type(message).__name__ for message, _ in MESSAGES])
def test_a_message_arrives_as_it_was_sent(message, direction):
    frame = wire.encode(message, 17)
    header_bytes, payload_bytes = wire.measure(frame[: wire.PREFIX.size])
    assert payload_bytes == 17
    assert header_bytes == len(frame) - wire.PREFIX.size
    assert wire.decode(frame[wire.PREFIX.size :], direction) == message


def test_every_message_and_item_is_tested_here():
    directions = (
        wire.Greeting,
        wire.ToWorker,
        wire.FromWorker,
        wire.ToPeer,
        wire.FromPeer,
        wire.ToBroker,
        wire.FromBroker,
        wire.ToHost,
        wire.FromHost,
    )
    known = {kind for union in directions for kind in get_args(union)}
    assert {type(message) for message, _ in MESSAGES} == known
    assert {type(item) for item in ITEMS} == set(get_args(wire.Item))


def test_a_newer_peer_may_add_fields_at_the_end():
    data = msgspec.msgpack.encode({"type": "done", "elapsed": 3})
    assert wire.decode(data, "from-worker") == wire.Done()
    assert wire.decode(msgspec.msgpack.encode({"type": "batch", "items": [["synchronize", 1, 2]]}), "to-worker")


def test_a_call_is_small():
    calls = [wire.Call(40, [1_000_000, 1_000_001], 1_000_002) for _ in range(100)]
    assert len(wire.encode(wire.Batch(calls))) < 100 * 30
