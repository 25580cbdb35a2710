"""Where the edge keeps its things, and what the sync process tells the web workers: one small JSON file."""

from __future__ import annotations

import contextlib
import fcntl
import platform
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from millpond import MillpondError
from millpond.files import lock, replace
from millpond.schema import RefusedModel
from millpond.settings import EdgeSettings

KEEP_REFUSALS = 20
OWNED_S = 2.0
"""How long a start waits for the last processes of a killed edge to end."""


class EdgeBusy(MillpondError):
    """Another edge runs on the same home."""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A model that was refused: `code` for metrics, the rest for people."""

    code: str
    model: RefusedModel


class SyncState(msgspec.Struct, frozen=True, kw_only=True):
    """What the sync process knows."""

    last_contact: str | None = None
    """When the hub last answered, RFC 3339, UTC."""
    errors: dict[str, str] = {}
    """Why the last attempt failed, by what was attempted (`models`, `corrections`); empty while all is well."""
    champion: str | None = None
    """Manifest digest that the followed tag names at the hub."""
    refusals: list[Refusal] = []
    """The latest refusals, the newest last."""
    refused: dict[str, int] = {}
    """Refusals ever, by code."""
    key: str = ""
    """SHA-256 of the public key that the refusals were made with."""

    def refusal(self, digest: str | None) -> Refusal | None:
        """Return why a model was refused, or None."""
        return next((refusal for refusal in reversed(self.refusals) if refusal.model.digest == digest), None)


class EdgeFiles:
    """The paths below `home/edge`."""

    def __init__(self, home: Path) -> None:
        self.root = home / "edge"
        self.models = self.root / "models"
        self.predictions = self.root / "predictions.db"
        self.outbox = self.root / "outbox.db"
        self.sync = self.root / "sync.json"
        self.metrics = self.root / "metrics"
        self._lock = self.root / "lock"

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Hold the home while the edge runs; the kernel lets go of it when the last of its processes ends.

        Raises:
            EdgeBusy: another edge runs there.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with self._lock.open("w") as file:
            try:
                lock(file, OWNED_S)
            except BlockingIOError:
                raise EdgeBusy(
                    f"Another edge runs on {self.root}; two would fetch and send everything twice. "
                    "Stop it first, or set MILLPOND_HOME to another directory."
                ) from None
            yield

    def is_running(self) -> bool:
        """Return whether an edge runs on this home."""
        try:
            with self._lock.open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


class StateFile:
    """`sync.json`: one process writes it, from any of its threads; all may read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._state = self._written = read_state(path)

    @property
    def state(self) -> SyncState:
        """Return the present state."""
        return self._state

    def update(self, **changes: Any) -> None:
        """Change fields, and write the file if anything is different."""
        with self._lock:
            self._state = msgspec.structs.replace(self._state, **changes)
            if self._state == self._written:
                return
            with contextlib.suppress(OSError):  # a full disk: the next change is written, or the one after
                replace(self._path, msgspec.json.encode(self._state), durable=False)
                self._written = self._state

    def attempted(self, what: str, error: str | None) -> None:
        """Note how an attempt at `what` ended; without an error it was a contact with the hub."""
        with self._lock:
            errors = {known: said for known, said in self._state.errors.items() if known != what}
            if error is None:
                self.update(errors=errors, last_contact=utc_now())
            else:
                self.update(errors=errors | {what: error})

    def refuse(self, refusal: Refusal) -> None:
        """Remember a refused model."""
        with self._lock:
            counts = self._state.refused
            others = [known for known in self._state.refusals if known.model.digest != refusal.model.digest]
            self.update(
                refusals=[*others, refusal][-KEEP_REFUSALS:],
                refused=counts | {refusal.code: counts.get(refusal.code, 0) + 1},
            )


def read_state(path: Path) -> SyncState:
    """Return what the file says; nothing known where it is missing or damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=SyncState)
    except (OSError, msgspec.MsgspecError):
        return SyncState()


def edge_name(settings: EdgeSettings) -> str:
    """Return this edge's name at the hub: as set, else the host's, with what a name cannot have replaced."""
    return re.sub(r"[^A-Za-z0-9._:-]", "-", settings.name or platform.node()).lstrip("._:-")[:128] or "edge"


def utc_now() -> str:
    """Return the time, RFC 3339, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
