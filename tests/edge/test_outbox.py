"""Accepted means on disk; it leaves the outbox only for what a receipt says; no room means refused."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from millpond.edge.outbox import KEEP_STORED, Outbox, OutboxFull
from millpond.schema import Correction, RefusedCorrection


def make(number: int, text: str = "a text") -> Correction:
    return Correction(id=f"c{number}", text=text, label="a", created="2026-01-02T03:04:05Z")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@pytest.fixture
def outbox(path: Path) -> Iterator[Outbox]:
    outbox = Outbox(path, max_waiting=1000)
    yield outbox
    outbox.close()


def test_what_was_put_waits_in_order_through_a_restart(outbox: Outbox, path: Path) -> None:
    for number in range(3):
        assert outbox.put(make(number, "with \x00 and ü")).state == "waiting"
    again = Outbox(path, max_waiting=1000)
    assert again.waiting(2) == [make(0, "with \x00 and ü"), make(1, "with \x00 and ü")]
    assert again.installation == outbox.installation
    again.close()


def test_the_same_id_is_the_same_correction_before_and_after_delivery(outbox: Outbox) -> None:
    outbox.put(make(1))
    outbox.put(make(1))
    assert outbox.count("waiting") == 1
    outbox.settle(["c1"], [])
    assert outbox.put(make(1)).state == "stored"
    assert outbox.count("waiting") == 0


def test_only_what_the_receipt_names_stops_waiting(outbox: Outbox) -> None:
    for number in range(4):
        outbox.put(make(number))
    outbox.settle(["c0", "never-sent"], [RefusedCorrection(id="c2", reason="no such label")])
    assert [correction.id for correction in outbox.waiting(10)] == ["c1", "c3"]
    (refused,) = outbox.latest(10, "refused")
    assert (refused.correction.id, refused.reason) == ("c2", "no such label")


def test_a_refused_one_is_set_aside_until_a_person_sends_it_again(outbox: Outbox) -> None:
    outbox.put(make(1))
    outbox.settle([], [RefusedCorrection(id="c1", reason="why")])
    assert outbox.put(make(1)).state == "refused"
    assert outbox.waiting(10) == []
    assert outbox.retry_refused() == 1
    assert outbox.waiting(10) == [make(1)]


def test_only_the_last_delivered_ones_are_kept_and_nothing_that_waits_goes(outbox: Outbox) -> None:
    count = KEEP_STORED + 50
    for number in range(count):
        outbox.put(make(number))
    outbox.settle([f"c{number}" for number in range(1, count)], [])
    assert outbox.count("stored") == KEEP_STORED
    assert outbox.waiting(10) == [make(0)]
    assert outbox.latest(1)[0].correction.id == f"c{count - 1}"
    assert len(outbox.latest(1000)) == KEEP_STORED + 1
    assert outbox.put(make(1, "taken in at another time")).state == "stored"  # its id is still known
    assert outbox.waiting(10) == [make(0)]
    assert outbox.total() == count


def test_more_than_may_wait_is_refused_and_room_is_found_again(path: Path) -> None:
    outbox = Outbox(path, max_waiting=2)
    outbox.put(make(1))
    outbox.put(make(2))
    with pytest.raises(OutboxFull, match="was not taken in"):
        outbox.put(make(3))
    assert outbox.put(make(1)).state == "waiting"  # that one is in already
    outbox.settle(["c1"], [])
    outbox.put(make(3))
    assert [correction.id for correction in outbox.waiting(10)] == ["c2", "c3"]
    outbox.close()


FILL = textwrap.dedent("""
    import resource, signal, sys
    from pathlib import Path
    from millpond.edge.outbox import Outbox, OutboxFull
    from millpond.schema import Correction
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    outbox = Outbox(Path(sys.argv[1]), max_waiting=1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    for number in range(1000):
        try:
            outbox.put(Correction(id=f"c{number}", text="x" * 20_000, label="a"))
        except OutboxFull as error:
            print("full", error)
            break
        print("taken", f"c{number}", flush=True)
""")


def test_a_full_disk_refuses_and_keeps_all_that_was_accepted(path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", FILL, str(path), "500000"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    taken = [line.split()[1] for line in said if line.startswith("taken")]
    assert said[-1].startswith("full")
    assert "was not taken in" in said[-1]
    assert 5 < len(taken) < 40
    outbox = Outbox(path, max_waiting=1000)
    assert [correction.id for correction in outbox.waiting(1000)] == taken
    outbox.put(make(1000))
    assert outbox.count("waiting") == len(taken) + 1
    outbox.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which only root may")
def test_a_real_full_file_system_refuses_and_keeps_all_that_was_accepted(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        outbox = Outbox(mount / "outbox.db", max_waiting=1000)
        taken: list[str] = []
        with pytest.raises(OutboxFull, match="disk is full"):  # noqa: PT012
            while True:
                taken.append(outbox.put(make(len(taken), "x" * 20_000)).correction.id)
        assert taken
        assert [correction.id for correction in outbox.waiting(1000)] == taken
        outbox.close()
    finally:
        subprocess.run(["umount", mount], check=True)


WRITER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from millpond.edge.outbox import Outbox
    from millpond.schema import Correction
    outbox = Outbox(Path(sys.argv[1]), max_waiting=100_000)
    for number in range(100_000):
        outbox.put(Correction(id=f"c{number}", text="x" * 300, label="a"))
        print(number, flush=True)
""")


def test_kill_9_loses_nothing_that_was_accepted(path: Path) -> None:
    accepted = -1
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for line in writer.stdout:
        accepted = int(line)
        if accepted >= 200:
            break
    writer.kill()
    writer.wait()
    writer.stdout.close()
    outbox = Outbox(path, max_waiting=100_000)
    ids = [correction.id for correction in outbox.waiting(100_000)]
    assert ids[: accepted + 1] == [f"c{number}" for number in range(accepted + 1)]
    outbox.close()


def test_threads_and_connections_may_write_at_once(outbox: Outbox, path: Path) -> None:
    other = Outbox(path, max_waiting=1000)

    def write(target: Outbox, first: int) -> None:
        for number in range(first, first + 25):
            target.put(make(number))

    writers = [
        threading.Thread(target=write, args=(target, 100 * index)) for index, target in enumerate([outbox, other] * 2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert outbox.count("waiting") == 100
    other.close()
