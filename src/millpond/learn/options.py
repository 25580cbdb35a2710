"""How a training goes: its options, and the learning rate that follows from them. Knows no framework."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from millpond import MillpondError


class TrainingError(MillpondError):
    """Training cannot go on; the message says why and what to change."""


class TrainOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long, in which steps. What is None follows the model (`DEFAULTS`), `COMMON`, or the amount of data."""

    epochs: Annotated[int, Meta(ge=0, le=10_000)] | None = None
    batch_size: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Texts a step; fewer where that would give an epoch under `MIN_STEPS` steps, unless it is set."""
    learning_rate: Annotated[float, Meta(gt=0, le=1e30)] | None = None
    """The highest; see `rate_at`."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """How the learning rate falls after the warm-up: not, or to 0 in a line or in half a cosine."""
    warmup: Annotated[float, Meta(ge=0, lt=1)] | None = None
    """Share of all steps in which the learning rate rises from 0, in a line."""
    clip_norm: Annotated[float, Meta(ge=0)] | None = None
    """Gradients that are longer, all together, are shortened to this (Pascanu et al. 2013); 0: never."""
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    """What matrix products are computed in; weights, loss, validation and what is exported stay float32."""
    by_length: bool | None = None
    """Whether texts of like length share a batch, so that less is padding."""
    patience: Annotated[int, Meta(ge=0)] | None = None
    """Epochs without a better validation loss after which training ends; 0: never."""
    framework: Literal["torch", "paddle"] | None = None
    """What computes the steps; `millpond.learn.paddle` says how."""
    compile: bool | None = None
    """Whether the step goes through `torch.compile`, and so is captured on a pool device; see `learn.step`.

    None: only on a GPU of a pool."""


COMMON = TrainOptions(
    schedule="constant",
    warmup=0.0,
    clip_norm=0.0,
    precision="float32",
    by_length=False,
    patience=0,
    framework="torch",
)
"""What holds for each model that sets nothing else."""


def filled(options: TrainOptions, default: TrainOptions) -> TrainOptions:
    """Return `options` with the values of `default` where it has None."""
    given = {key: value for key, value in msgspec.structs.asdict(options).items() if value is not None}
    return msgspec.structs.replace(default, **given)


def settled(options: TrainOptions, *, validates: bool) -> TrainOptions:
    """Return `options` with `COMMON` filled in; `validates`: there are rows to validate on.

    Raises:
        TrainingError: they contradict each other.
    """
    if options.patience and not validates:
        raise TrainingError("patience needs rows to validate on: set --validation above 0, or leave --patience out.")
    return filled(options, COMMON)


def rate_at(step: int, steps: int, options: TrainOptions) -> float:
    """Return the learning rate of one of all `steps`, the first of which is 0."""
    assert options.learning_rate is not None
    rising = round((options.warmup or 0.0) * steps)
    if step < rising:
        return options.learning_rate * (step + 1) / rising
    done = (step - rising) / (steps - rising)
    share = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return options.learning_rate * share.get(options.schedule or "constant", 1.0)


def no_number(losses: list[float], steps: list[tuple[int, float]], epoch: int, options: TrainOptions) -> TrainingError:
    """Return the error that says after which of some steps a loss or weight was no number, and what to try.

    A step is its number and its learning rate. Where all losses are numbers it is a weight, after the last step.
    """
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses) - 1)
    what = "a weight" if math.isfinite(losses[bad]) else "the loss"
    step, rate = steps[bad]
    advice = [f"Lower the learning rate (--learning-rate {(options.learning_rate or 0) / 10:g})"]
    advice += [] if options.clip_norm else ["clip gradients (--clip-norm 1)"]
    advice += [] if options.warmup else ["warm up (--warmup 0.1)"]
    advice += ["compute in --precision bfloat16"] if options.precision == "float16" else []
    return TrainingError(
        f"{what} is no longer a number: at step {step} of epoch {epoch} the learning rate was {rate:g}, and the steps "
        f"were too large. {', or '.join(advice)}."
    )
