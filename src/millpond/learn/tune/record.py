"""What a search has done, line by line in `trials.jsonl`: all that it needs to go on after kill -9, and nothing else.

Each line is JSON of a closed set of kinds. Lines are only appended; one that was cut off by a kill is dropped.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

import msgspec
from msgspec import Meta

from millpond import MillpondError
from millpond.learn.checkpoint import dotted
from millpond.learn.tune.space import Parameters, Value

NAME = "trials.jsonl"
FORMAT = 1
MAX_RECORD_BYTES = 256 * 1024**2
MAX_TRIALS = 100_000


class TuneError(MillpondError):
    """A search cannot begin, go on, or be read; the message says why and what to do."""


class _Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    pass


class Begun(_Line, frozen=True, tag="begun"):
    """The first line: what must be equal for the search to be the same one."""

    format: int
    search: dict[str, Any]
    """The recipe in plain values but where its data lies; with the whole space."""
    data: str
    """Digest of the rows that trials learn from and are measured on."""


class Started(_Line, frozen=True, tag="started"):
    """A trial begins, or begins anew after it was cut off."""

    number: Annotated[int, Meta(ge=0, lt=MAX_TRIALS)]
    parameters: dict[str, Value]
    at_s: Annotated[float, Meta(ge=0)]
    """Seconds of searching until then; those of earlier sessions count."""


class Reported(_Line, frozen=True, tag="epoch"):
    """A trial has done an epoch."""

    number: Annotated[int, Meta(ge=0, lt=MAX_TRIALS)]
    epoch: Annotated[int, Meta(ge=1)]
    loss: float
    accuracy: float
    """Of validation, as `loss`."""
    training_loss: float
    seconds: Annotated[float, Meta(ge=0)]
    """Of this epoch."""
    at_s: Annotated[float, Meta(ge=0)]


How = Literal["finished", "stopped", "failed", "expired"]
"""It did all of its epochs; others were better after as many; it broke; the budget of minutes was used up."""


class Ended(_Line, frozen=True, tag="ended"):
    """A trial has ended; it is never run again."""

    number: Annotated[int, Meta(ge=0, lt=MAX_TRIALS)]
    how: How
    at_s: Annotated[float, Meta(ge=0)]
    error: str = ""


Line = Begun | Started | Reported | Ended


@dataclass
class Trial:
    """One set of values and what came of it."""

    number: int
    parameters: Parameters
    epochs: list[Reported] = field(default_factory=list)
    ended: Ended | None = None

    @property
    def state(self) -> str:
        """Return how it ended, or `running`."""
        return self.ended.how if self.ended else "running"

    def best(self, metric: str) -> Reported | None:
        """Return its best epoch by a metric of validation, the first of equals; None before the first."""
        if not self.epochs:
            return None
        if metric == "loss":
            return min(self.epochs, key=lambda epoch: epoch.loss)
        return max(self.epochs, key=lambda epoch: epoch.accuracy)

    def objective(self, metric: str) -> float | None:
        """Return what the search lowers: its best loss, or its best share of wrong answers."""
        best = self.best(metric)
        return None if best is None else best.loss if metric == "loss" else 1 - best.accuracy


class Record:
    """The trials of one search, in memory and in their file, which no second search can open at a time."""

    def __init__(self, path: Path, file: BinaryIO, begun: Begun, trials: list[Trial]) -> None:
        self.path = path
        self.begun = begun
        self.trials = trials
        self._file = file

    @classmethod
    def create(cls, path: Path, begun: Begun) -> Self:
        """Begin the record of a new search.

        Raises:
            TuneError: there is one already, or the disk does not take it.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("xb", buffering=0)
        except FileExistsError as error:
            raise TuneError(f"{path} is there already. Go on with it: --resume. Or give another --out.") from error
        except OSError as error:
            raise TuneError(f"{path} cannot be written: {error}. Give another --out.") from error
        record = cls(path, file, begun, [])
        record._lock()
        record.add(begun)
        return record

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the record of a search, to go on with it; a last line that was cut off goes.

        Raises:
            TuneError: there is none, it is damaged, or another process is at work on it.
        """
        try:
            file = path.open("r+b", buffering=0)
        except OSError as error:
            raise TuneError(f"there is no search to resume: {path}: {error.strerror}. Leave --resume out.") from error
        record = cls(path, file, Begun(format=FORMAT, search={}, data=""), [])
        record._lock()
        try:
            raw = path.read_bytes() if path.stat().st_size <= MAX_RECORD_BYTES else b""
            whole = raw.rfind(b"\n") + 1
            record.begun, record.trials = _parse(raw[:whole], path)
            file.truncate(whole)
            file.seek(whole)
        except BaseException:
            file.close()
            raise
        return record

    def close(self) -> None:
        """Let another process have it."""
        self._file.close()

    def add(self, line: Line) -> None:
        """Append a line and take it into `trials`.

        Raises:
            TuneError: the disk does not take it.
        """
        try:
            self._file.write(msgspec.json.encode(line) + b"\n")
            if not isinstance(line, Reported):
                os.fsync(self._file.fileno())
        except OSError as error:
            raise TuneError(f"{self.path} cannot be written: {error}. Make room, then go on: --resume.") from error
        _take(self.trials, line)

    @property
    def spent_s(self) -> float:
        """Return the seconds of searching until the last line."""
        lines = [line for trial in self.trials for line in (*trial.epochs, trial.ended) if line is not None]
        return max((line.at_s for line in lines), default=0.0)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise TuneError(f"another search is at work in {self.path.parent}. Wait for it, or end it.") from error

    def check(self, begun: Begun) -> None:
        """Refuse to go on as another search than the one that is recorded.

        Raises:
            TuneError: recipe, space, seed or data differ.
        """
        ours, theirs = dotted(self.begun.search), dotted(begun.search)
        found = [
            f"{key} is {ours.get(key)!r} there and {theirs.get(key)!r} here"
            for key in sorted(ours | theirs)
            if ours.get(key) != theirs.get(key)
        ]
        found += ["the rows are others"] if self.begun.data != begun.data else []
        if found:
            raise TuneError(
                f"{self.path} is of another search: {'; '.join(found[:5])}. Give the options and data of that one, or "
                "begin anew without --resume."
            )


def read_trials(path: Path) -> list[Trial]:
    """Return the trials of a record without locking it.

    Raises:
        TuneError: it cannot be read, or is damaged.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TuneError(f"{path} cannot be read: {error}") from error
    return _parse(raw[: raw.rfind(b"\n") + 1], path)[1]


def _parse(raw: bytes, path: Path) -> tuple[Begun, list[Trial]]:
    decoder = msgspec.json.Decoder(Line)
    trials: list[Trial] = []
    begun: Begun | None = None
    for number, line in enumerate(raw.splitlines(), 1):
        try:
            found = decoder.decode(line)
            if isinstance(found, Begun):
                if begun is not None or found.format != FORMAT:
                    raise ValueError(f"a second beginning, or format {found.format}, which is not {FORMAT}")
                begun = found
            elif begun is None:
                raise ValueError("it does not begin with what is searched")
            else:
                _take(trials, found)
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError) as error:
            raise TuneError(
                f"{path} line {number} is damaged: {error}. Take the line and all after it out of the file, and what "
                "is before it can be resumed; or begin anew with another --out."
            ) from error
    if begun is None:
        raise TuneError(f"{path} is empty, or larger than {MAX_RECORD_BYTES} bytes: begin anew with another --out.")
    return begun, trials


def _take(trials: list[Trial], line: Line) -> None:
    """Bring the trials up to a line.

    Raises:
        ValueError: the line cannot follow those before it.
    """
    if isinstance(line, Begun):
        return
    if isinstance(line, Started) and line.number == len(trials):
        trials.append(Trial(line.number, line.parameters))
        return
    if line.number >= len(trials) or trials[line.number].ended is not None:
        raise ValueError(f"trial {line.number} does not run at this point")
    trial = trials[line.number]
    if isinstance(line, Started):  # cut off, and now from its beginning again
        if line.parameters != trial.parameters:
            raise ValueError(f"trial {line.number} began with other values")
        trial.epochs.clear()
    elif isinstance(line, Reported):
        if line.epoch != len(trial.epochs) + 1:
            raise ValueError(f"epoch {line.epoch} of trial {line.number} does not follow")
        trial.epochs.append(line)
    else:
        trial.ended = line
