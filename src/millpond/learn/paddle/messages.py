"""What the two processes say to each other: a job and arrays in a directory, then lines of JSON from the child.

The child ends after `Done` or `Failed`; when it ends without either, it has died. Knows neither torch nor Paddle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from millpond.learn.encoded import Encoded
from millpond.learn.options import TrainOptions
from millpond.learn.progress import Ending, Epoch, Position, Progress

JOB = "job.json"
WEIGHTS = "weights.safetensors"
"""Those to begin with; each tensor has torch's name and layout, whoever writes it."""
TRAINED = "trained.safetensors"
CHECKPOINT = "checkpoint.safetensors"
"""A checkpoint's tensors: the parent's to go on from, then the child's, which the parent deletes when it has them."""
MAX_LINE_BYTES = 16 * 1024 * 1024
"""Longest line: a checkpoint's position holds every epoch so far."""

Architecture = Literal["seqcnn", "lstm"]


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be trained; sizes are those of the weights."""

    version: str
    """Of Millpond: both ends must have the same."""
    parent: int
    """Process that the child must not outlive."""
    architecture: Architecture
    dropout: Annotated[float, Meta(ge=0, lt=1)]
    embedding_dropout: Annotated[float, Meta(ge=0, lt=1)]
    training: TrainOptions
    """With nothing left out."""
    seed: int
    device: str
    """auto, cpu, cuda or cuda:N."""
    validates: bool
    """Whether there are rows to choose the best epoch on."""
    max_ids: Annotated[int, Meta(ge=1)]
    """Ids of a batch, padding included, when nothing is learned."""
    checkpoint_s: Annotated[float, Meta(ge=0)]
    """Seconds between two checkpoints; 0: none."""
    position: Position | None
    """Where to go on from, with the tensors of `CHECKPOINT`."""


class Started(msgspec.Struct, frozen=True, tag=True):
    """Paddle is loaded."""

    version: str
    device: str


class Stepped(msgspec.Struct, frozen=True, tag=True):
    """So far it is."""

    progress: Progress


class EpochDone(msgspec.Struct, frozen=True, tag=True):
    """An epoch is done, validation included."""

    epoch: Epoch


class Saved(msgspec.Struct, frozen=True, tag=True):
    """A checkpoint's tensors lie in `CHECKPOINT`; there is no further one until they are deleted."""

    position: Position


class Done(msgspec.Struct, frozen=True, tag=True):
    """Training has ended, and the weights of epoch `best` lie in `TRAINED`; see `progress.Training`."""

    best: int
    ended: Ending
    error: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Training cannot go on; there are no weights."""

    error: str


Message = Started | Stepped | EpochDone | Saved | Done | Failed


def missing(python: str, why: str) -> str:
    """Return what to do about a Python without Paddle."""
    return (
        f"training in Paddle needs PaddlePaddle, which {python} cannot load ({why}). Install it: "
        "pip install 'millpond[paddle]'. Or name the Python of an environment that has it: "
        "MILLPOND_LEARN_PADDLE_PYTHON."
    )


def write_rows(work: Path, name: str, data: Encoded, labels: NDArray[np.int64]) -> None:
    """Write the rows of a split; they need not fit into memory.

    Raises:
        OSError: the disk does not take them.
    """
    for part, array in (("ids", data.ids), ("starts", data.starts), ("labels", labels)):
        np.save(work / f"{name}-{part}.npy", array, allow_pickle=False)


def check_rows(data: Encoded, labels: NDArray[np.int64], words: int, classes: int) -> None:
    """Refuse rows that a model does not have room for: Paddle's kernels would read beyond its weights.

    Raises:
        ValueError: they are not what `write_rows` has written, or have ids or labels beyond the model's.
    """
    ids, starts = data.ids, data.starts
    if [f"{part.dtype} {part.ndim}" for part in (ids, starts, labels)] != ["int32 1", "int64 1", "int64 1"]:
        raise ValueError("the rows are no ids, starts and labels")
    if (
        len(starts) < 2
        or len(labels) != len(data)
        or starts[0] != 0
        or starts[-1] != len(ids)
        or data.lengths.min() < 0
    ):
        raise ValueError("the rows do not begin and end within the ids")
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= words or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"the rows have ids beyond the model's {words} words, or labels beyond its {classes}")


def read_rows(work: Path, name: str) -> tuple[Encoded, NDArray[np.int64]]:
    """Return what `write_rows` has written, mapped from disk."""
    ids, starts, labels = (
        np.load(work / f"{name}-{part}.npy", mmap_mode="r", allow_pickle=False) for part in ("ids", "starts", "labels")
    )
    return Encoded(ids, starts), labels
