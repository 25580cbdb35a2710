"""Checkpoints of a training: all that a loop needs to go on after kill -9 as if nothing had happened.

A checkpoint is one safetensors file, never pickle: tensors, and the plain values as JSON in its header. It is written
under another name, synced and renamed, so that a file that is there is whole. The last `KEPT` of them stay.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
from torch import Tensor

from millpond import MillpondError
from millpond.files import sync
from millpond.learn.progress import Position

KEPT = 2
"""Checkpoints on disk: should the newest be damaged, the one before it is taken."""
FORMAT = 1


class CheckpointError(MillpondError):
    """A checkpoint cannot be written, or does not belong to the training that should go on from it."""


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """What must be equal for a training to be the same: the whole recipe but where its data lies, and the data."""

    recipe: dict[str, Any]
    train: str
    """Digest of the rows that are learned from, in their order."""
    validation: str | None

    def differences(self, other: Fingerprint) -> list[str]:
        """Return in words what differs, `self` first."""
        ours, theirs = dotted(self.recipe), dotted(other.recipe)
        found = [
            f"{key} is {ours.get(key)!r} there and {theirs.get(key)!r} here"
            for key in sorted(ours | theirs)
            if ours.get(key) != theirs.get(key)
        ]
        if self.train != other.train:
            found.append("the rows to learn from are others")
        if self.validation != other.validation:
            found.append("the rows to validate on are others")
        return found


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int
    fingerprint: Fingerprint
    position: Position


class Checkpoints:
    """The checkpoints of one training, in a directory of their own.

    Those of another training are refused, or where `strict` is false deleted: a job then begins anew by itself.
    """

    def __init__(self, directory: Path, fingerprint: Fingerprint, *, every_s: float, strict: bool = True) -> None:
        self.directory = directory
        self.fingerprint = fingerprint
        self.every_s = every_s
        self.strict = strict
        self._written = time.monotonic()

    def is_due(self) -> bool:
        """Return whether it is time to write one; never where `every_s` is 0."""
        return self.every_s > 0 and time.monotonic() - self._written >= self.every_s

    def write(self, position: Position, tensors: Mapping[str, Tensor]) -> None:
        """Write one, durably, and delete all but the last `KEPT`.

        Raises:
            CheckpointError: the disk does not take it.
        """
        header = _Header(format=FORMAT, fingerprint=self.fingerprint, position=position)
        # The same tensor may be there under two names, and the device may be far away: each gets a copy on the host.
        plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        path = self.directory / f"{position.epoch:06}-{position.step:08}.safetensors"
        temporary = path.with_name(f".{path.name}.new")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(plain, temporary, {"millpond": msgspec.json.encode(header).decode()})
            sync(temporary)
            temporary.rename(path)
            sync(self.directory)
            for old in _newest_first(self.directory)[KEPT:]:
                old.unlink()
        except (OSError, safetensors.SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise CheckpointError(
                f"a checkpoint cannot be written into {self.directory}: {error}. Make room, or train without: "
                "MILLPOND_LEARN_CHECKPOINT_S=0."
            ) from error
        self._written = time.monotonic()

    def read(self) -> tuple[Position, dict[str, Tensor]] | None:
        """Return the newest checkpoint that is whole; None if there is none.

        Raises:
            CheckpointError: it is of another recipe or other data, or none of those that are there can be read.
        """
        try:
            return self._read()
        except CheckpointError:
            if self.strict:
                raise
            clear(self.directory)
            return None

    def _read(self) -> tuple[Position, dict[str, Tensor]] | None:
        damage = ""
        for path in _newest_first(self.directory):
            try:
                header = _read_header(path)
                tensors = safetensors.torch.load_file(path)
            except (OSError, safetensors.SafetensorError, msgspec.MsgspecError, ValueError) as error:
                damage = damage or f"{path}: {error}"
                continue
            if differences := header.fingerprint.differences(self.fingerprint):
                raise CheckpointError(
                    f"the checkpoint {path} belongs to another training: {'; '.join(differences[:5])}. Give the "
                    "options and data of that training, or begin anew without --resume."
                )
            return header.position, tensors
        if damage:
            raise CheckpointError(f"no checkpoint can be read ({damage}). Begin anew without --resume.")
        return None


def dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def clear(directory: Path) -> None:
    """Delete the checkpoints in a directory, and then the directory."""
    if directory.is_dir():
        for path in (*_newest_first(directory), *directory.glob(".*.new")):
            path.unlink(missing_ok=True)
        if not any(directory.iterdir()):
            directory.rmdir()


def is_checkpointed(directory: Path) -> bool:
    """Return whether there is a checkpoint in a directory."""
    return bool(_newest_first(directory))


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("[0-9]*-[0-9]*.safetensors"), reverse=True)


def _read_header(path: Path) -> _Header:
    with safetensors.safe_open(path, framework="numpy") as file:
        raw = (file.metadata() or {}).get("millpond", "")
    header = msgspec.json.decode(raw, type=_Header)
    if header.format != FORMAT:
        raise ValueError(f"its format is {header.format}; this version of Millpond reads {FORMAT}")
    return header
