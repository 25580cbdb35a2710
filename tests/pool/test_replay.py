"""A graph as one launch: by a stand-in for CUDA graphs, that holds memory in place as they do (stand_in_gpu.py)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from millpond.pool import graphs, numerics, wire
from millpond.pool.executor import Memory
from pool.stand_in_gpu import NAME, StandInTape
from worker_site import WorkerProcess

MATRIX = wire.Geometry("float32", (2, 2), (2, 1))
SIZE = 16
NOTHING = memoryview(b"")


class CountingTape(StandInTape):
    """Counts what it does."""

    records = replays = 0
    refuses = False

    def record(self, run):
        CountingTape.records += 1
        if CountingTape.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().record(run)

    def replay(self):
        CountingTape.replays += 1
        super().replay()


class Site:
    """A session that runs one graph: it adds `a` to `w` in place, and returns `w @ x` and twice that."""

    def __init__(self, limit_bytes: int = 2**20) -> None:
        self.executor = graphs.GraphExecutor(torch.device("cpu"), Memory(limit_bytes))
        self.next = 1
        self.define("aten::add_.Tensor", 0, results=[])
        self.define("aten::mm", 1, results=[MATRIX])
        self.define("aten::add.Tensor", 2, results=[MATRIX])
        steps = [wire.Step(0, [0, 1], []), wire.Step(1, [0, 2], []), wire.Step(2, [3, 3], [])]
        self.run_items(wire.DefineGraph(0, [MATRIX] * 3, steps, [3, 4]))

    def define(self, op: str, plan: int, results: Sequence[wire.Geometry]) -> None:
        setting = numerics.described(numerics.current())
        self.run_items(wire.Define(plan, op, [wire.Operand(0), wire.Operand(1)], {}, list(results), setting))

    def run_items(self, *items: wire.Item) -> list[wire.Message]:
        with torch.inference_mode():
            answers = list(self.executor.run(wire.Batch(list(items)), NOTHING))
        assert not any(isinstance(answer, wire.Failed) for answer, _ in answers), answers
        return answers

    def handle(self) -> int:
        self.next += 10
        return self.next

    def put(self, values: torch.Tensor) -> int:
        handle = self.handle()
        self.run_items(wire.Put(handle, "float32", [2, 2], values.numpy().tobytes()))
        return handle

    def read(self, handle: int) -> torch.Tensor:
        ((_, data),) = self.run_items(wire.Read(handle, 0, SIZE))
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(2, 2)

    def graph(self, *operands: int) -> tuple[int, int]:
        first = self.handle()
        self.run_items(wire.Run(0, list(operands), first))
        return first, first + 1

    def free(self, *handles: int) -> None:
        self.run_items(wire.Free(list(handles)))


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has executors record by `CountingTape`, from zero."""
    monkeypatch.setattr(graphs, "tapes_of", lambda device: CountingTape)
    CountingTape.records = CountingTape.replays = 0
    CountingTape.refuses = False


def train(site: Site, steps: int, *, hold: int = 0) -> None:
    """Run the graph with new inputs each time, compare with the host; keep the results of `hold` runs back."""
    w = torch.eye(2)
    there = site.put(w)
    a = site.put(torch.full((2, 2), 0.5))
    held: list[tuple[tuple[int, int], torch.Tensor]] = []
    occupied = []
    for _ in range(steps):
        x = torch.randn(2, 2)
        occupied.append(site.put(x))  # what came before stays, so that this is elsewhere each time
        results = site.graph(there, a, occupied[-1])
        w = w + 0.5
        held.append((results, w @ x))
        for (one, two), expected in held:
            torch.testing.assert_close(site.read(one), expected)
            torch.testing.assert_close(site.read(two), 2 * expected)
        torch.testing.assert_close(site.read(there), w)
        if len(held) > hold:
            site.free(*held.pop(0)[0])


def test_after_a_few_runs_a_graph_is_replayed_with_what_changes_copied_in() -> None:
    train(Site(), 12)
    assert CountingTape.records == 1
    assert CountingTape.replays >= 7


def test_results_that_the_session_still_holds_outlive_the_next_run() -> None:
    train(Site(), 12, hold=3)
    assert CountingTape.replays >= 7


def test_a_result_can_be_the_next_input() -> None:
    site = Site()
    there, a = site.put(torch.eye(2)), site.put(torch.zeros(2, 2))
    x, expected = site.put(torch.eye(2) * 2), torch.eye(2) * 2
    for _ in range(12):
        one, x = site.graph(there, a, x)
        expected = 2 * expected
        torch.testing.assert_close(site.read(x), expected)
        site.free(one)
    assert CountingTape.replays


def test_what_is_written_to_is_written_to_where_it_is_now() -> None:
    site = Site()
    a, x = site.put(torch.ones(2, 2)), site.put(torch.eye(2))
    held = []
    for step in range(12):
        w = site.put(torch.full((2, 2), float(step)))
        held.append(w)
        results = site.graph(w, a, x)
        torch.testing.assert_close(site.read(w), torch.full((2, 2), step + 1.0))
        torch.testing.assert_close(site.read(results[0]), torch.full((2, 2), step + 1.0))
        site.free(*results)
    assert CountingTape.replays


def test_an_input_that_moves_after_all_is_copied_from_then_on() -> None:
    site = Site()
    there, a, x = site.put(torch.eye(2)), site.put(torch.zeros(2, 2)), site.put(torch.ones(2, 2))
    for _ in range(6):
        site.free(*site.graph(there, a, x))
    assert (CountingTape.records, CountingTape.replays) == (1, 3)
    held = []
    for step in range(8):
        held.append(site.put(torch.full((2, 2), float(step))))
        results = site.graph(there, a, held[-1])
        torch.testing.assert_close(site.read(results[0]), torch.full((2, 2), float(step)))
        site.free(*results)
    assert CountingTape.records == 2
    assert CountingTape.replays >= 3 + 4


def test_a_graph_that_the_device_cannot_record_runs_op_by_op(caplog: pytest.LogCaptureFixture) -> None:
    CountingTape.refuses = True
    train(Site(), 10)
    assert (CountingTape.records, CountingTape.replays) == (1, 0)
    assert "3 ops runs op by op, as the device cannot record it: operation not permitted" in caplog.text


def test_its_memory_is_the_leases_and_is_given_back_when_that_is_short() -> None:
    site = Site(limit_bytes=1024)
    memory = site.executor.memory
    there, a, x = site.put(torch.eye(2)), site.put(torch.zeros(2, 2)), site.put(torch.ones(2, 2))
    for _ in range(6):
        site.free(*site.graph(there, a, x))
    assert CountingTape.records == 1
    assert memory.used_bytes == 3 * SIZE + 2 * SIZE
    results = site.graph(there, a, x)
    filling = [site.put(torch.full((2, 2), 7.0)) for _ in range(1024 // SIZE - 5)]
    assert memory.used_bytes == memory.limit_bytes
    torch.testing.assert_close(site.read(results[0]), torch.ones(2, 2))
    site.free(*filling, *results)
    site.executor.close()
    assert memory.used_bytes == 0


def test_nothing_is_recorded_where_memory_is_short() -> None:
    site = Site(limit_bytes=6 * SIZE)
    there, a, x = site.put(torch.eye(2)), site.put(torch.zeros(2, 2)), site.put(torch.ones(2, 2))
    for _ in range(6):
        site.free(*site.graph(there, a, x))
    assert CountingTape.records == 0


@pytest.fixture
def gpu_worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    """A worker that says it is a GPU, and records graphs."""
    command = [sys.executable, str(Path(__file__).with_name("stand_in_gpu.py"))]
    with contextlib.closing(WorkerProcess(log=tmp_path / "worker.log", command=command, device=NAME)) as worker:
        yield worker
        assert "op by op" not in worker.log.read_text()


def test_a_model_learns_alike_whether_its_graphs_are_recorded_or_not(gpu_worker: WorkerProcess) -> None:
    done = gpu_worker.run(LEARNS, timeout_s=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["step", "model"])
def test_models_of_several_widths_learn_as_on_a_worker_that_records_nothing(
    gpu_worker: WorkerProcess, worker: WorkerProcess, how: str
) -> None:
    program = str(Path(__file__).with_name("compile_models.py"))
    losses = []
    for each in (gpu_worker, worker):
        done = subprocess.run(
            [sys.executable, program, "pool", how], env=each.environment(), capture_output=True, text=True, timeout=110
        )
        assert done.returncode == 0, done.stderr
        losses.append(json.loads(done.stdout))
    for name, expected in losses[1].items():
        assert losses[0][name] == pytest.approx(expected, abs=1e-4), name


LEARNS = """
import torch
from torch import nn

def losses(device, compiled):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.2), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 3)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, capturable=False)
    torch.manual_seed(4)
    generator = torch.Generator().manual_seed(5)

    def forward(x, y):
        return nn.functional.cross_entropy(model(x), y)

    step = torch.compile(optimizer.step) if compiled else optimizer.step
    forward = torch.compile(forward) if compiled else forward
    found, kept = [], []
    for _ in range(14):
        x = torch.randn(5, 6, generator=generator).to(device)
        y = torch.randint(3, (5,), generator=generator).to(device)
        loss = forward(x, y)
        kept.append(loss)
        loss.backward()
        step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found == [loss.item() for loss in kept]
    return found

eager, captured = losses("pool", False), losses("pool", True)
torch.testing.assert_close(torch.tensor(captured), torch.tensor(eager), rtol=1e-5, atol=1e-6)
assert captured[-1] != captured[0]
"""
