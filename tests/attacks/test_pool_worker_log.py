"""A worker whose clients make it talk: the host's log stays short and says so, and nothing in it is more than text."""

from __future__ import annotations

import asyncio
import sys

from millpond.pool import tls, wire
from millpond.pool.host import OwnHost
from millpond.pool.worker_log import BURST_BYTES, BYTES_PER_S, KEPT_BYTES, WorkerLog

LINE = b"refused a caller: it is not one of ours\n"


def test_a_worker_that_says_little_is_passed_on_word_for_word():
    log = WorkerLog("lease-1")
    assert "".join(log.add(LINE, now=float(second)) for second in range(600)) == LINE.decode() * 600
    assert log.rest() == ""


def test_what_is_too_much_is_left_out_and_counted():
    log = WorkerLog("lease-1")
    passed = "".join(log.add(LINE, now=10.0) for _ in range(10_000))
    assert BURST_BYTES - len(LINE) < len(passed) <= BURST_BYTES
    left_out = 10_000 * len(LINE) - len(passed)
    later = log.add(b"again\n", now=12.0)
    assert later == f"worker lease-1: left out {left_out} bytes of its log\nagain\n"


def test_an_hour_of_it_is_no_more_than_its_rate_allows():
    log = WorkerLog("lease-1")
    passed = sum(len(log.add(LINE * 100, now=tenth / 10)) for tenth in range(36_000))
    assert passed < (BURST_BYTES + 3600 * BYTES_PER_S) * 1.1


def test_the_end_is_kept_to_tell_why_a_worker_ended_even_if_nothing_of_it_was_passed_on():
    log = WorkerLog("lease-1")
    for _ in range(10_000):
        log.add(LINE, now=0.0)
    log.add(b"x" * (BURST_BYTES + 1) + b"\nRuntimeError: no such device\n\n", now=0.0)
    assert log.last_line() == "RuntimeError: no such device"
    assert len(log._end) == KEPT_BYTES
    assert WorkerLog("lease-1").last_line() == ""


def test_what_would_move_a_cursor_or_fake_a_line_is_shown_as_what_it_is():
    log = WorkerLog("lease-1")
    assert log.add(b"\x1b[2J\rlease 2 has ended\x00 \xff\xc2\x9b\n", now=0.0) == (
        "\\x1b[2J\\x0dlease 2 has ended\\x00 �\\x9b\n"
    )


def test_a_host_bounds_the_log_of_a_worker_that_floods_it(capsys):
    program = "import sys; [sys.stderr.write('x' * 4095 + chr(10)) for _ in range(500)]; sys.exit('it was too much')"
    host = OwnHost("here", "127.0.0.1", (sys.executable, "-c", program), tls.Files())
    start = wire.StartWorker(1, "lease-1", "cpu", 2**20, "token", "", 0.0)
    why = asyncio.run(asyncio.wait_for(host.run_worker(start, lambda report: None), 30))
    assert why == "ended with exit code 1: it was too much"
    written = capsys.readouterr().err
    assert len(written) < 2 * BURST_BYTES
    assert "bytes of its log" in written
