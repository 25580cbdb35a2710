"""How several workers make one step: each takes a part of its batch, and all get the same gradients and sums.

The gradients are those of the whole batch's mean loss, however uneven the parts are: a worker's loss counts by its
rows. What one worker decides alone (validation, when to stop) it tells the others, so that all go the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

READ_STEPS = 50
"""Steps between two reads of loss and accuracy, at which all workers must read."""


@dataclass(frozen=True)
class Share:
    """A worker's part of a batch."""

    rows: NDArray[np.int64]
    """Never empty: a worker for which no row is left computes one that does not count."""
    counted: int
    """How many of them, from the first on, count."""
    weight: float
    """Of the mean loss of the rows in that of the batch."""


class Alone:
    """One worker, with every batch to itself."""

    rank = 0

    def share(self, batch: NDArray[np.int64]) -> Share:
        """Return which rows of a batch this worker computes."""
        return Share(batch, len(batch), 1.0)

    def combine(self, model: Module, sums: Tensor) -> None:
        """Replace a model's gradients, and `sums`, by what they are over all workers."""

    def first(self, compute: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        """Return what the first worker computes."""
        return compute()

    def is_read_due(self, step: int, elapsed_s: float, every_s: float) -> bool:
        """Return whether sums are read after a step, the first of which is 0; all workers answer alike."""
        return elapsed_s > every_s


class Together(Alone):
    """One of several workers in `torch.distributed`'s default group."""

    def __init__(self, device: torch.device) -> None:
        self.rank = torch.distributed.get_rank()
        self._workers = torch.distributed.get_world_size()
        self._device = device

    def share(self, batch: NDArray[np.int64]) -> Share:
        """Return which rows of a batch this worker computes: one of as many even parts as there are workers."""
        return share(batch, self.rank, self._workers)

    def combine(self, model: Module, sums: Tensor) -> None:
        """Replace a model's gradients, and `sums`, by their sums over all workers, in one exchange."""
        parts = [*_gradients(model), sums]
        flat = torch.cat([part.reshape(-1).float() for part in parts])
        torch.distributed.all_reduce(flat)
        with torch.no_grad():
            for part, summed in zip(parts, torch.split(flat, [part.numel() for part in parts]), strict=True):
                part.copy_(summed.view_as(part))

    def first(self, compute: Callable[[], tuple[float, float]]) -> tuple[float, float]:
        """Return what the first worker computes; the others wait for it."""
        answer = torch.tensor(compute() if self.rank == 0 else (0.0, 0.0), dtype=torch.float64, device=self._device)
        torch.distributed.broadcast(answer, 0)
        one, other = answer.tolist()
        return one, other

    def is_read_due(self, step: int, elapsed_s: float, every_s: float) -> bool:
        """Return whether sums are read after a step; by its number, for the clocks of workers differ."""
        return (step + 1) % READ_STEPS == 0


def share(batch: NDArray[np.int64], rank: int, workers: int) -> Share:
    """Return the part of a batch that worker `rank` computes; together the parts are the batch."""
    rows = np.array_split(batch, workers)[rank]
    return Share(rows, len(rows), len(rows) / len(batch)) if len(rows) else Share(batch[:1], 0, 0.0)


def _gradients(model: Module) -> list[Tensor]:
    """Return the gradients of a model's parameters; 0 where a part of a batch gave none."""
    found = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
    return found
