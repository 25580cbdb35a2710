"""Models on the edge's disk, and which of them is served.

Rule: `current.json` names only models that lie complete and verified beside it. A model is verified in
`incoming/`, renamed to its digest, and then named; each step is atomic and synced, so that a kill at any moment
leaves the old model or the new one, never a half. Writers hold a lock; readers need none.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from millpond import MillpondError
from millpond.files import lock, replace, sync
from millpond.registry import ModelNotFound, RegistryError, parse_config, parse_manifest
from millpond.registry.manifest import CONFIG_FILE, check_digest
from millpond.schema import ModelRef

POINTER = "current.json"
MANIFEST_FILE = "manifest.json"
LOCK_WAIT_S = 60.0


class ModelsBusy(MillpondError):
    """Another process does not let go of the models."""


class RollbackImpossible(MillpondError):
    """There is no version to go back to."""


class Current(msgspec.Struct, frozen=True, kw_only=True):
    """`current.json`: the digests served until now, the present one last."""

    history: list[str]
    pinned: str | None = None
    """The hub's champion that was rolled back from: it is not served again, until the hub names another."""

    @property
    def serving(self) -> str:
        """Return the digest of the model to serve."""
        return self.history[-1]


class ModelShelf:
    """The models below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pointer = root / POINTER
        (root / "incoming").mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Return where a model lies, or would lie."""
        return self.root / check_digest(digest).removeprefix("sha256:")

    def incoming(self, digest: str) -> Path:
        """Return the directory that a model is gathered and verified in; what was begun there is kept."""
        directory = self.root / "incoming" / self.path(digest).name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def clear_incoming(self, keep: str | None = None) -> None:
        """Remove what was begun, of all models but `keep`."""
        for directory in (self.root / "incoming").iterdir():
            if keep is None or directory.name != self.path(keep).name:
                shutil.rmtree(directory, ignore_errors=True)

    def current(self) -> Current | None:
        """Return what `current.json` says, or None before the first model."""
        try:
            current = msgspec.json.decode(self.pointer.read_bytes(), type=Current)
        except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):  # damaged: sync writes it anew
            return None
        return current if current.history else None

    def has(self, digest: str) -> bool:
        """Return whether a verified model is here."""
        return self.path(digest).is_dir()

    def describe(self, digest: str) -> ModelRef:
        """Return name and version of a model that is here.

        Raises:
            RegistryError: it is not here, or its config cannot be read.
        """
        try:
            config = parse_config((self.path(digest) / CONFIG_FILE).read_bytes())
        except OSError as error:
            raise ModelNotFound(f"{digest} is not on this edge ({error}). Sync fetches it again.") from error
        return ModelRef(name=config.name, version=config.version, digest=digest)

    def previous(self) -> list[ModelRef]:
        """Return the models that `roll_back` would go back to, the next one first."""
        current = self.current()
        refs = []
        for digest in reversed(current.history[:-1] if current else []):
            with contextlib.suppress(RegistryError):  # removed a moment ago
                refs.append(self.describe(digest))
        return refs

    def is_whole(self, digest: str) -> bool:
        """Return whether every byte of a model is still what it was when it was added."""
        place = self.path(digest)
        try:
            raw = (place / MANIFEST_FILE).read_bytes()
            files = {name: blob.digest for name, blob in parse_manifest(raw).files().items()}
            return _has_digest(place / MANIFEST_FILE, digest) and all(
                _has_digest(place / name, wanted) for name, wanted in files.items()
            )
        except (OSError, RegistryError):
            return False

    def add(self, digest: str, manifest: bytes) -> None:
        """Take over a model that was verified in its incoming directory; its manifest comes to lie beside it."""
        incoming, place = self.incoming(digest), self.path(digest)
        (incoming / MANIFEST_FILE).write_bytes(manifest)
        for path in (*incoming.iterdir(), incoming):
            sync(path)
        with self._locked():
            if place.exists():
                shutil.rmtree(incoming)
            else:
                incoming.rename(place)
            sync(self.root)

    def activate(self, digest: str, keep: int) -> None:
        """Serve a model that is here, end a pin, and remove all but the last `keep` models."""
        with self._locked():
            current = self.current()
            history = [known for known in current.history if known != digest] if current else []
            self._write(Current(history=[*history, digest][-keep:]))
            self._prune()

    def roll_back(self) -> ModelRef:
        """Serve the version before the present one, and pin it.

        Raises:
            RollbackImpossible: there is none.
        """
        with self._locked():
            current = self.current()
            if current is None or len(current.history) < 2:
                raise RollbackImpossible(
                    "There is no earlier version on this edge to go back to. "
                    "Roll back at the hub (millpond hub rollback); this edge follows it."
                )
            self._write(Current(history=current.history[:-1], pinned=current.pinned or current.serving))
            return self.describe(current.history[-2])

    def discard(self, digest: str) -> None:
        """Remove a model that turned out to be damaged; the one before it, if any, is served again."""
        with self._locked():
            current = self.current()
            history = [known for known in current.history if known != digest] if current else []
            if history:
                self._write(Current(history=history))
            else:
                self.pointer.unlink(missing_ok=True)
            self._prune()

    def _prune(self) -> None:
        current = self.current()
        known = {self.path(digest).name for digest in current.history} if current else set()
        for directory in self.root.iterdir():
            if directory.is_dir() and directory.name != "incoming" and directory.name not in known:
                # renamed first: a half-removed model must not look like a whole one
                gone = self.root / "incoming" / f"{directory.name}.gone"
                directory.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)

    def _write(self, current: Current) -> None:
        replace(self.pointer, msgspec.json.encode(current))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.root / ".lock").open("w") as file:
            try:
                lock(file, LOCK_WAIT_S)
            except BlockingIOError:
                raise ModelsBusy(
                    f"Another process has been changing {self.root} for over {LOCK_WAIT_S:.0f} s. If none is, look who "
                    f"holds {file.name} (fuser), then try again."
                ) from None
            yield


def _has_digest(path: Path, digest: str) -> bool:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" == digest
