"""Frames of hostile clients, thousands at a time: refused in order, and nobody else notices. See fuzz_pool_wire.py."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import get_args

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks import pool_frames
from attacks.fuzz_pool_wire import LEASE_BYTES, Tally, fuzz, run_session
from millpond.pool import operators, wire
from millpond.pool.errors import WireError
from millpond.pool.executor import Executor, Memory
from millpond.pool.graphs import GraphExecutor
from millpond.pool.numerics import Setting
from pool_site import wait_for
from worker_site import WorkerProcess

FLAT_BYTES = 160 * 2**20
"""What a worker may grow by, whatever the number of frames: threads' stacks, and arenas of the allocator."""


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(get_args(wire.Direction)))
def test_any_message_of_the_wires_own_types_is_decoded_or_refused(chance, direction):
    message = pool_frames.any_message(direction, chance)
    header = wire.encode(message)[wire.PREFIX.size :]
    for receiver in get_args(wire.Direction):
        with contextlib.suppress(WireError):
            wire.decode(header, receiver)


def gentle(frames):
    """Leave out ops: PyTorch's kernels get their share in processes of their own."""
    harmless = {"aten::mm", "aten::add_.Tensor", "aten::embedding", "aten::clone"}
    for header, payload in frames:
        with contextlib.suppress(WireError):
            batch = wire.decode(header, "to-worker")
            items = [item for item in batch.items if not isinstance(item, wire.Define) or item.op in harmless]
            header = wire.encode(wire.Batch(items))[wire.PREFIX.size :]
        yield header, payload


@pytest.mark.parametrize("kind", [Executor, GraphExecutor])
def test_thousands_of_frames_end_in_order_and_leave_no_memory_counted(kind):
    recorded = pool_frames.well_meant()
    memory = Memory(LEASE_BYTES)
    outcomes: Counter[str] = Counter()
    state = torch.get_rng_state()
    with torch.inference_mode():
        for number in range(450):
            outcomes += run_session(gentle(pool_frames.session(Random(number), recorded)), memory, kind)
    torch.set_rng_state(state)
    with Setting(wire.Numerics()):  # as other tests expect it
        pass
    assert outcomes["frames"] > 800
    assert min(outcomes[outcome] for outcome in ("answered", "ended", "refused")) > 10, outcomes


def test_the_well_meant_session_is_one():
    outcomes = run_session(pool_frames.well_meant(), Memory(LEASE_BYTES), GraphExecutor)
    assert outcomes == {"frames": 3, "answered": 3}


def test_every_op_that_is_allowed_can_be_fuzzed():
    chance = Random(0)
    for name in sorted(operators.allowed()):
        define, _ = pool_frames.call(name, chance, 0)
        wire.decode(wire.encode(wire.Batch([define]))[wire.PREFIX.size :], "to-worker")


@pytest.mark.slow
def test_calls_of_pytorchs_own_tests_with_little_changed_end_in_order():
    """Of a fifth of the operators: half a minute, most of it to record the calls."""
    tally = Tally()
    assert list(fuzz(5000, 7, tally=tally, way=pool_frames.SAMPLES, every=5)) == []
    started, ended = (sum(tally.counts[place::2].tolist()) for place in (0, 1))
    assert ended > started / 2 > 500


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_thousand_frames_leave_a_real_worker_and_its_other_session_as_they_were(tmp_path):
    """About a minute."""
    recorded = pool_frames.well_meant()
    worker = WorkerProcess(LEASE_BYTES, log=tmp_path / "worker.log")
    process = psutil.Process(worker.process.pid)
    with contextlib.closing(worker), worker.connect() as good:
        good.send(wire.Batch([wire.Put(1, "uint8", (8,), bytes(range(8)))]))
        sent = number = 0
        before = 0
        while sent < 100_000:
            with worker.connect() as hostile, contextlib.suppress(OSError, WireError):  # it hung up
                for _ in range(100):  # sessions in one, until the worker ends it
                    number += 1
                    for header, payload in gentle(pool_frames.session(Random(number), recorded)):
                        sent += 1
                        hostile.socket.sendall(wire.PREFIX.pack(len(header), len(payload)) + header + payload)
                        while hostile.has_input():
                            hostile.receive(10)
            if not before and sent > 5000:
                before = process.memory_info().rss
        good.send(wire.Batch([wire.Read(1, 0, 8)]))
        answer, data = good.receive(10)
        assert isinstance(answer, wire.Data)
        assert bytes(data) == bytes(range(8))
        wait_for(lambda: worker.next_report().sessions == 1)
        assert process.memory_info().rss - before < FLAT_BYTES
        assert process.num_threads() < 60
    assert "Traceback" not in worker.log.read_text()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this Python or machine"
)
def test_the_decoder_stands_a_fuzzer_that_sees_how_far_it_gets(tmp_path):
    """Half a minute."""
    command = [sys.executable, str(Path(__file__).parent / "fuzz_decoder.py"), "-runs=50000", "-seed=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done 50000 runs" in done.stderr
