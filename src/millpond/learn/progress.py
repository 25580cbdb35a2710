"""Where a training is and what it came to, in plain values: what is shown, kept and sent. Knows no framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

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
