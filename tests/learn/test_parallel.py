"""Several workers that share each batch, here as threads; with processes and gloo in test_workers.py."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from millpond.learn.datasets import Dataset
from millpond.learn.encoded import Encoded
from millpond.learn.models import TextModel, build, options_of
from millpond.learn.options import TrainOptions
from millpond.learn.parallel import Alone, Share, Together, share
from millpond.learn.progress import Training
from millpond.learn.train import train

CPU = torch.device("cpu")


@given(st.integers(1, 40), st.integers(1, 9))
def test_the_parts_of_a_batch_are_the_batch(rows: int, workers: int) -> None:
    batch = np.random.default_rng(0).permutation(rows)
    parts = [share(batch, rank, workers) for rank in range(workers)]
    assert np.array_equal(np.concatenate([part.rows[: part.counted] for part in parts]), batch)
    assert sum(part.weight for part in parts) == pytest.approx(1)
    assert all(len(part.rows) for part in parts)
    assert max(part.counted for part in parts) - min(part.counted for part in parts) <= 1


class Threads(Alone):
    """One of several threads that meet in `barrier` and put what they have on `table`."""

    def __init__(self, rank: int, table: list[list[Tensor]], barrier: threading.Barrier) -> None:
        self.rank = rank
        self._table = table
        self._barrier = barrier
        self.shares: list[Share] = []

    def share(self, batch: np.ndarray) -> Share:
        self.shares.append(share(batch, self.rank, len(self._table)))
        return self.shares[-1]

    def combine(self, model: torch.nn.Module, sums: Tensor) -> None:
        own = [*(p.grad for p in model.parameters() if p.grad is not None), sums]
        self._table[self.rank] = [tensor.clone() for tensor in own]
        self._barrier.wait(20)
        for i, tensor in enumerate(own):
            tensor.copy_(torch.stack([row[i] for row in self._table]).sum(0))
        self._barrier.wait(20)

    def first(self, compute: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        return compute()

    def is_read_due(self, step: int, elapsed_s: float, every_s: float) -> bool:
        return False


def fresh(small: Dataset) -> tuple[TextModel, Encoded, tuple[Encoded, np.ndarray]]:
    sizes = {"embedding": 8, "filters": 8, "min_count": 1, "dropout": 0.0, "embedding_dropout": 0.0}
    options = options_of("seqcnn", sizes)
    encoder = options.learn_encoder(small.train.texts)
    data = Encoded.of(encoder, small.train.texts)
    torch.manual_seed(0)
    model = build("seqcnn", options, encoder.rows, 2)
    model.prepare(data, small.train.labels)
    return model, data, (Encoded.of(encoder, small.test.texts), small.test.labels)


def how(batch_size: int) -> TrainOptions:
    return TrainOptions(epochs=2, batch_size=batch_size, learning_rate=0.01, clip_norm=1.0)


@pytest.mark.parametrize(("count", "batch_size"), [(2, 119), (3, 40)])  # at last one row for two workers
def test_workers_come_to_what_one_comes_to(small: Dataset, count: int, batch_size: int) -> None:
    small = replace(small, train=small.train.take(np.arange(120)))
    model, data, held = fresh(small)
    table: list[list[Tensor]] = [[] for _ in range(count)]
    barrier = threading.Barrier(count)
    workers = [Threads(rank, table, barrier) for rank in range(count)]
    models = [copy.deepcopy(model) for _ in workers]
    results: dict[int, Training] = {}

    def work(rank: int) -> None:
        results[rank] = train(
            models[rank], data, small.train.labels, held, how(batch_size), CPU, seed=0, workers=workers[rank]
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    alone = train(model, data, small.train.labels, held, how(batch_size), CPU, seed=0)
    assert len({part.counted for worker in workers for part in worker.shares}) > 1
    for rank in range(count):
        for ours, theirs in zip(results[rank].epochs, alone.epochs, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
            assert ours.accuracy == theirs.accuracy
            assert ours.validation_loss == pytest.approx(theirs.validation_loss, rel=1e-5)
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(models[rank].state_dict()[name], weight, rtol=1e-3, atol=1e-4)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_gradient_that_a_part_lacks_counts_as_zero(group: None) -> None:
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 1), "idle": torch.nn.Linear(2, 1)})
    model["used"](torch.ones(1, 2)).sum().backward()
    sums = torch.tensor([1.5, 2.0])
    together = Together(CPU)
    together.combine(model, sums)
    assert model.get_parameter("used.weight").grad.tolist() == [[1.0, 1.0]]  # type: ignore[union-attr]
    assert model.get_parameter("idle.weight").grad.tolist() == [[0.0, 0.0]]  # type: ignore[union-attr]
    assert sums.tolist() == [1.5, 2.0]
    assert together.first(lambda: (0.25, 0.1)) == (0.25, 0.1)
    assert together.share(np.arange(3)).weight == 1.0
