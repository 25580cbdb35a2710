"""docs/reference/wire.md has every message, item and value, with its fields, and the limits."""

import re
import typing
from pathlib import Path

import msgspec
import pytest

from millpond.pool import arrivals, broker, peers, scheduler, wire

PAGE = (Path(__file__).parents[2] / "docs/reference/wire.md").read_text()
MESSAGES = {
    message
    for union in (
        wire.Greeting,
        wire.ToBroker,
        wire.FromBroker,
        wire.ToWorker,
        wire.FromWorker,
        wire.ToJob,
        wire.FromJob,
        wire.FromPeer,
        wire.ToPeer,
        wire.ToHost,
        wire.FromHost,
    )
    for message in typing.get_args(union)
}
BEFORE, SESSION = PAGE.split("## Client and worker")
ROW = re.compile(r"^\| ([a-z`, -]+) \|(.*)\|$", re.MULTILINE)
ROWS = {
    tag: row for tags, row in ROW.findall(SESSION) + ROW.findall(BEFORE) for tag in re.findall(r"`([a-z-]+)`", tags)
}
ITEMS = {*typing.get_args(wire.Item), wire.Batch}
VALUES = {wire.Operand, wire.View, wire.Slot, wire.Symbol, wire.Complex, wire.BigInt, wire.Geometry, wire.Step}


@pytest.mark.parametrize(
    "message", sorted(MESSAGES | ITEMS | VALUES, key=lambda m: m.__name__), ids=lambda m: m.__name__
)
def test_each_message_is_on_the_page_with_its_fields(message):
    row = ROWS[message.__struct_config__.tag]
    wanted = {field.name for field in msgspec.structs.fields(message)}
    nested = {
        wire.Granted: [wire.WorkerAddress],
        wire.Status: [wire.DeviceStatus, wire.LeaseStatus],
        wire.Join: [wire.HostDevice],
        wire.Introduce: [wire.PeerAddress],
    }.get(message, [])
    if nested:
        wanted |= {field.name for struct in nested for field in msgspec.structs.fields(struct)}
    if message is wire.Ask:  # "as `call`"
        row = ROWS["call"]
    assert wanted <= set(re.findall(r"`([a-z_]+)`", row))


def test_what_a_program_sets_for_its_process_is_on_the_page():
    assert {field.name for field in msgspec.structs.fields(wire.Numerics)} <= set(re.findall(r"`([a-z0-9_]+)`", PAGE))


def test_the_limits_are_those_of_the_code():
    assert wire.MAX_GREETING_BYTES == 4 * 1024
    assert wire.MAX_HEADER_BYTES == 8 * 2**20
    assert wire.MAX_PAYLOAD_BYTES == 64 * 2**20
    assert f"at most {wire.MAX_ITEMS:,}" in PAGE
    assert f"at most {wire.MAX_GRAPHS:,} graphs" in PAGE
    assert f"steps, at most {wire.MAX_GRAPH_STEPS:,}" in PAGE
    assert f"`data` (≤ {wire.MAX_INLINE_BYTES // 1024} KiB)" in PAGE
    assert f"`PROTOCOL` (now {wire.PROTOCOL})" in PAGE
    text = " ".join(PAGE.split())
    assert wire.MAX_HOST_DEVICES * scheduler.MAX_PARTS == wire.MAX_HOST_WORKERS
    assert f"at most {wire.MAX_HOST_DEVICES} a host, and {broker.MAX_HOSTS} hosts" in text
    assert f"in parts of at most {peers.CHUNK_BYTES // 2**20} MiB" in text
    assert f"At most {arrivals.MAX_ARRIVALS:,} deliveries wait at a worker" in text
    assert f"`receive` waits {arrivals.RECEIVE_S:g} s at most" in text
    assert f"at most {broker.MAX_CLIENTS} clients, {broker.MAX_GREETING} callers" in text
    assert f"{scheduler.MAX_PENDING} waiting leases, {scheduler.MAX_PARTS} leases on a device" in text
    assert f"and {scheduler.KEEP_PAST} past ones" in text
