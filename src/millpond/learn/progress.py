"""Where a training is and what it came to, in plain values: what is shown, kept and sent. Knows no framework."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

T = TypeVar("T")

REPORT_EVERY_S = 0.5
"""Seconds between two reads of loss and accuracy."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to; validation values are None where there is no validation split."""

    epoch: int
    loss: float
    accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    seconds: float
    learning_rate: float = 0.0
    """That of its last step."""
    padding: float = 0.0
    """Which share of what its steps computed on was padding."""


class Position(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The plain values of a checkpoint."""

    epoch: Annotated[int, Meta(ge=1)]
    step: Annotated[int, Meta(ge=0)]
    seconds: float
    best: Annotated[int, Meta(ge=0)]
    best_loss: float | None
    epochs: list[Epoch]
    scaler: dict[str, int | float]
    device: str


@dataclass(kw_only=True)
class Standing:
    """The plain variables of a loop, whose framework adds its own. `step` batches of epoch `epoch` are done."""

    epoch: int = 1
    step: int = 0
    seconds: float = 0.0
    """How long this epoch took before it was taken up again."""
    epochs: list[Epoch] = field(default_factory=list)
    best: int = 0
    best_loss: float = math.inf

    def position_on(self, device: str, seconds: float, scaler: dict[str, int | float]) -> Position:
        """Return the values for a checkpoint; `seconds` is what the epoch has taken so far."""
        return Position(
            epoch=self.epoch,
            step=self.step,
            seconds=seconds,
            best=self.best,
            best_loss=self.best_loss if math.isfinite(self.best_loss) else None,
            epochs=self.epochs,
            scaler=scaler,
            device=device,
        )

    def go_back(self, position: Position) -> None:
        """Take the values of a checkpoint."""
        self.best, self.epochs = position.best, list(position.epochs)
        self.best_loss = math.inf if position.best_loss is None else position.best_loss
        self.epoch, self.step, self.seconds = position.epoch, position.step, position.seconds


def below(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """Return what a checkpoint names with a prefix, by the names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def loss_and_accuracy(probability: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[float, float]:
    """Return mean log loss, in nats, and accuracy of probabilities [texts, labels]."""
    of_truth = probability[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(of_truth, 1e-30)).mean()), float((probability.argmax(1) == labels).mean())


@dataclass(frozen=True)
class Progress:
    """Where the loop is, since the start of its epoch."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    texts_per_s: float
    left_s: float
    """Seconds that the rest will take, at the rate so far."""


Ending = Literal["finished", "early", "interrupted", "diverged"]
"""All epochs done; no better for `patience` epochs; Ctrl-C; the loss is no longer a number."""


@dataclass
class Training:
    """What the loop did: the model holds the weights of epoch `best` (1 is the first; 0: of the unfinished one)."""

    epochs: list[Epoch] = field(default_factory=list)
    best: int = 0
    ended: Ending = "finished"
    error: str = ""
    """Why it diverged, and what to try."""
    trained_by: str = ""
    """The framework with its version, and the device."""
    resumed: tuple[int, int] | None = None
    """The epoch and the number of its steps that were done when a checkpoint was taken up."""

    @property
    def interrupted(self) -> bool:
        """Return whether Ctrl-C ended it."""
        return self.ended == "interrupted"
