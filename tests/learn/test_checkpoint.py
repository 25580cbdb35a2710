"""Checkpoints: whole or not there, few, of this training alone, and enough to go on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from millpond.learn.checkpoint import KEPT, CheckpointError, Checkpoints, Fingerprint, clear, is_checkpointed
from millpond.learn.datasets import Dataset
from millpond.learn.encoded import Encoded
from millpond.learn.options import TrainOptions
from millpond.learn.progress import Position, Training
from millpond.learn.train import train

from .test_train import CPU, fresh, options

SAME = Fingerprint(recipe={"training": {"epochs": 3}, "seed": 0}, train="a", validation=None)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def position(epoch: int = 1, step: int = 0) -> Position:
    return Position(epoch=epoch, step=step, seconds=0.0, best=0, best_loss=None, epochs=[], scaler={}, device="cpu")


class Killed(BaseException):
    """In the place of a SIGKILL: nothing of ours handles it."""


def train_with(dataset: Dataset, place: Path, how: TrainOptions, *, kill_at: int = 0) -> tuple[Training, torch.Tensor]:
    """Train `seqcnn` and return all weights, or write a checkpoint before the `kill_at`th step and be killed."""
    model, data, encoder = fresh(dataset, "seqcnn", dropout=0.5)
    held = (Encoded.of(encoder, dataset.test.texts), dataset.test.labels)
    checkpoints = Checkpoints(place, SAME, every_s=0)
    if kill_at:
        steps = iter(range(1, kill_at + 1))
        write = checkpoints.write

        def write_and_die(*arguments: Any) -> None:
            write(*arguments)
            raise Killed

        checkpoints.is_due = lambda: next(steps) == kill_at  # type: ignore[method-assign]
        checkpoints.write = write_and_die  # type: ignore[method-assign]
    result = train(model, data, dataset.train.labels, held, how, CPU, seed=0, checkpoints=checkpoints)
    return result, torch.cat([tensor.flatten() for tensor in model.weights().values()])


@pytest.mark.parametrize(
    "how",
    [
        options(epochs=3),
        options(epochs=3, schedule="cosine", warmup=0.2, clip_norm=0.5, by_length=True),
        options(epochs=3, precision="bfloat16"),
        options(epochs=3, precision="float16", clip_norm=1.0),
    ],
    ids=["plain", "schedule", "bfloat16", "float16"],
)
def test_a_training_killed_twice_ends_bit_for_bit_as_an_unbroken_one(
    small: Dataset, tmp_path: Path, how: TrainOptions
) -> None:
    unbroken, weights = train_with(small, tmp_path / "unbroken", how)
    for kill_at in (3, 12):  # in the first epoch of 8 steps, and in the second
        with pytest.raises(Killed):
            train_with(small, tmp_path / "c", how, kill_at=kill_at)
    resumed, again = train_with(small, tmp_path / "c", how)
    assert resumed.resumed == (2, 5)
    assert torch.equal(weights, again)
    for key in ("loss", "accuracy", "validation_loss", "learning_rate", "padding"):
        assert [getattr(e, key) for e in resumed.epochs] == [getattr(e, key) for e in unbroken.epochs]
    assert resumed.best == unbroken.best


def test_few_checkpoints_stay_and_the_newest_is_read(place: Path) -> None:
    checkpoints = Checkpoints(place, SAME, every_s=1)
    assert checkpoints.read() is None
    for step in range(5):
        checkpoints.write(position(1, step), {"a": torch.tensor([step])})
    assert len(list(place.iterdir())) == KEPT
    found = checkpoints.read()
    assert found is not None
    assert (found[0].step, found[1]["a"].tolist()) == (4, [4])


@pytest.mark.parametrize("damage", [b"", b"\x80\x04not a checkpoint", None])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(place: Path, damage: bytes | None) -> None:
    checkpoints = Checkpoints(place, SAME, every_s=1)
    for step in (1, 2):
        checkpoints.write(position(1, step), {"a": torch.arange(1000)})
    newest = max(place.iterdir())
    newest.write_bytes(newest.read_bytes()[:-100] if damage is None else damage)
    found = checkpoints.read()
    assert found is not None
    assert found[0].step == 1
    min(place.iterdir()).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):
        checkpoints.read()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (Fingerprint(recipe={"training": {"epochs": 5}, "seed": 0}, train="a", validation=None), r"epochs is 3 .* 5"),
        (Fingerprint(recipe=SAME.recipe, train="b", validation=None), "rows to learn from are others"),
        (Fingerprint(recipe=SAME.recipe, train="a", validation="c"), "rows to validate on are others"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_or_where_not_strict_deleted(
    tmp_path: Path, other: Fingerprint, says: str
) -> None:
    Checkpoints(tmp_path / "c", SAME, every_s=1).write(position(), {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=says):
        Checkpoints(tmp_path / "c", other, every_s=1).read()
    assert is_checkpointed(tmp_path / "c")
    assert Checkpoints(tmp_path / "c", other, every_s=1, strict=False).read() is None
    assert not (tmp_path / "c").exists()


def test_a_checkpoint_that_does_not_fit_the_model_is_refused(small: Dataset, tmp_path: Path) -> None:
    Checkpoints(tmp_path, SAME, every_s=1).write(position(), {"model.weight": torch.zeros(3)})
    model, data, _ = fresh(small)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        train(
            model,
            data,
            small.train.labels,
            None,
            options(),
            CPU,
            seed=0,
            checkpoints=Checkpoints(tmp_path, SAME, every_s=1),
        )


def test_a_disk_that_takes_no_checkpoint_ends_training_with_advice(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file where the directory should be")
    with pytest.raises(CheckpointError, match="MILLPOND_LEARN_CHECKPOINT_S=0"):
        Checkpoints(tmp_path / "c", SAME, every_s=1).write(position(), {})


def test_what_a_kill_leaves_half_written_is_no_checkpoint_and_is_cleared(tmp_path: Path) -> None:
    place = tmp_path / "c"
    Checkpoints(place, SAME, every_s=1).write(position(), {"a": torch.zeros(1)})
    (place / ".000009-00000000.safetensors.new").write_bytes(b"half")
    found = Checkpoints(place, SAME, every_s=1).read()
    assert found is not None
    assert found[0].epoch == 1
    clear(place)
    assert not place.exists()
    clear(place)


def test_none_is_due_where_they_are_turned_off(tmp_path: Path) -> None:
    assert not Checkpoints(tmp_path, SAME, every_s=0).is_due()
    assert not Checkpoints(tmp_path, SAME, every_s=1000).is_due()
    assert Checkpoints(tmp_path, SAME, every_s=1e-9).is_due()
