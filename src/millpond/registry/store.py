"""Models on disk: one OCI image layout per model name, blobs named by their SHA-256.

A blob is written to a temporary name, synced, renamed; the index that names it comes last. So a reader needs no
lock and never sees half a model, whatever dies when. Writers of one name exclude each other with a file lock.
Source: OCI image specification 1.1, image-layout.md.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from millpond.files import lock, sync
from millpond.registry.errors import ArtifactInvalid, ModelNotFound, RegistryError
from millpond.registry.manifest import (
    ARTIFACT_TYPE,
    CONFIG_FILE,
    FILES,
    MANIFEST_TYPE,
    MAX_CONFIG_BYTES,
    MAX_FILE_BYTES,
    MAX_MANIFEST_BYTES,
    REF_NAME,
    Descriptor,
    build_manifest,
    check_digest,
    check_name,
    check_tag,
    is_name,
    is_version,
    parse_config,
    parse_manifest,
)

MAX_INDEX_BYTES = 16 * 1024 * 1024
LOCK_WAIT_S = 60.0
"""How long a push or a tag waits for another one of the same name."""
CHUNK_BYTES = 1024 * 1024
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
UNFINISHED = ".unfinished-"
"""Prefix of temporary names; what carries it while nobody holds the lock was left by a process that died."""
DEFAULT_TAG = "champion"


class PushedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model in the registry."""

    name: str
    version: str
    digest: str
    """Of the manifest; the model's identity for machines."""
    created: str
    tags: list[str]
    architecture: str
    labels: list[str]
    metrics: dict[str, float]
    size_bytes: int


class _Index(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """`index.json`: a descriptor per tag, and one without a tag for each manifest that has none."""

    schema_version: Literal[2]
    media_type: Literal["application/vnd.oci.image.index.v1+json"] = "application/vnd.oci.image.index.v1+json"
    manifests: list[Descriptor]


class Store:
    """All models below one directory; `<root>/<name>/` is one OCI image layout.

    Every method raises RegistryError for names, tags and digests that cannot be, ModelNotFound for what is not here,
    ArtifactInvalid for what is here but damaged.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    # --- writing ----------------------------------------------------------------------------------------------

    def push(self, model_dir: Path, tags: Iterable[str] = ()) -> PushedModel:
        """Add a signed model directory; its version becomes a tag, besides `tags`. Pushing it again changes nothing.

        Raises:
            ArtifactInvalid: the directory does not hold exactly a model's files, or its config is wrong.
            RegistryError: another model has this version already, or a tag is a version.
        """
        wanted = [check_tag(tag) for tag in tags]
        if not model_dir.is_dir():
            raise ArtifactInvalid(
                f"{model_dir} is no directory; a model is pushed as the directory that it was exported to."
            )
        present = {entry.name for entry in os.scandir(model_dir) if entry.is_file(follow_symlinks=False)}
        if missing := [name for name in FILES if name not in present]:
            raise ArtifactInvalid(f"{model_dir} is no complete model: {', '.join(missing)} missing.")
        config = parse_config(_read_limited(model_dir / CONFIG_FILE, MAX_CONFIG_BYTES))
        if any(is_version(tag) and tag != config.version for tag in wanted):
            raise RegistryError(f"A tag such as {config.version} belongs to the model of that version alone.")
        layout = self.root / check_name(config.name)
        with self._locked(config.name):
            _create_layout(layout)
            blobs = {name: _write(layout, _chunks(model_dir / name)) for name in FILES}
            if parse_config(_read_limited(_blob(layout, blobs[CONFIG_FILE][0]), MAX_CONFIG_BYTES)) != config:
                raise RegistryError(f"{model_dir} changed while it was pushed. Push it again when it is finished.")
            digest, size = _write(layout, [build_manifest(config, blobs)])
            self._point(config.name, digest, size, [config.version, *wanted])
        return self.describe(config.name, digest)

    def tag(self, name: str, digest: str, tag: str) -> None:
        """Let `tag` name the model `digest`, and no other any more.

        Raises:
            RegistryError: `tag` is a version such as `v7`: those never move.
        """
        check_tag(tag)
        if is_version(tag) and self.describe(name, digest).version != tag:
            raise RegistryError(
                f"{tag} is the name of one version and never moves. Choose a word, such as {DEFAULT_TAG}."
            )
        with self._locked(name):
            self._point(name, digest, len(self.manifest_bytes(name, digest)), [tag])

    def _point(self, name: str, digest: str, size: int, tags: Sequence[str]) -> None:
        """Write the index anew with `tags` on `digest`; the caller holds the lock."""
        layout = self.root / name
        entries = [*self._index(name)] if (layout / "index.json").exists() else []
        for entry in entries:
            tag = entry.annotations.get(REF_NAME, "")
            if tag in tags and is_version(tag) and entry.digest != digest:
                raise RegistryError(
                    f"{name} {tag} is in the registry already, with other content ({entry.digest}). "
                    "Versions never change: give the new model the next version."
                )
        entries = [entry for entry in entries if entry.annotations.get(REF_NAME) not in tags]
        entries += [_index_entry(digest, size, tag) for tag in dict.fromkeys(tags)]
        entries.sort(key=lambda entry: entry.annotations.get(REF_NAME, ""))
        _write(layout, [msgspec.json.encode(_Index(schema_version=2, manifests=entries))], layout / "index.json")

    # --- reading ----------------------------------------------------------------------------------------------

    def names(self) -> Sequence[str]:
        """Return the names of all models, sorted."""
        return sorted(index.parent.name for index in self.root.glob("*/index.json") if is_name(index.parent.name))

    def tags(self, name: str) -> dict[str, str]:
        """Return tag → digest of one model name."""
        entries = self._entries(name)
        return {entry.annotations[REF_NAME]: entry.digest for entry in entries if REF_NAME in entry.annotations}

    def resolve(self, reference: str) -> str:
        """Return the digest that `name:tag`, `name@sha256:…` or `name` (its champion) stands for."""
        name, tag, digest = split_reference(reference)
        if digest:
            if digest not in {entry.digest for entry in self._entries(name)}:
                raise ModelNotFound(f"{name} has no model {digest} here. See: millpond registry list {name}")
            return digest
        tags = self.tags(name)
        if tag not in tags:
            raise ModelNotFound(f"{name} has no tag {tag!r} here; it has: {', '.join(sorted(tags)) or 'none'}.")
        return tags[tag]

    def describe(self, name: str, digest: str) -> PushedModel:
        """Return what is known about one model."""
        manifest = parse_manifest(self.manifest_bytes(name, digest))
        raw = _read_limited(self.blob_path(name, manifest.config.digest), MAX_CONFIG_BYTES)
        _check_digest_of(raw, manifest.config.digest)
        config = parse_config(raw)
        return PushedModel(
            name=name,
            version=config.version,
            digest=digest,
            created=config.created,
            tags=sorted(tag for tag, tagged in self.tags(name).items() if tagged == digest),
            architecture=config.architecture,
            labels=config.labels,
            metrics=config.metrics,
            size_bytes=sum(descriptor.size for descriptor in manifest.files().values()),
        )

    def list(self, name: str) -> Sequence[PushedModel]:
        """Return every model of a name, the newest version first."""
        digests = dict.fromkeys(entry.digest for entry in self._entries(name))
        models = [self.describe(name, digest) for digest in digests]
        return sorted(models, key=lambda model: int(model.version[1:]), reverse=True)

    def next_version(self, name: str) -> str:
        """Return the version after the highest one, `v1` for a new name."""
        if not (self.root / check_name(name) / "index.json").exists():
            return "v1"
        return f"v{1 + max((int(tag[1:]) for tag in self.tags(name) if is_version(tag)), default=0)}"

    def manifest_bytes(self, name: str, digest: str) -> bytes:
        """Return a manifest, its hash checked."""
        raw = _read_limited(self.blob_path(name, digest), MAX_MANIFEST_BYTES)
        _check_digest_of(raw, digest)
        return raw

    def blob_path(self, name: str, digest: str) -> Path:
        """Return the path of a blob that is here; its content is not checked."""
        path = _blob(self.root / check_name(name), check_digest(digest))
        if not path.is_file() or path.is_symlink():
            raise ModelNotFound(f"{name} has no blob {digest} here.")
        return path

    def checkout(self, name: str, digest: str, to: Path) -> Path:
        """Re-create the model directory as `to`, which must not exist; every byte is hashed on the way."""
        if to.exists():
            raise RegistryError(f"{to} exists already; a model is checked out to a new directory.")
        files = parse_manifest(self.manifest_bytes(name, digest)).files()
        with _told_apart(f"{name} cannot be checked out to {to}"):
            to.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=to.parent) as temporary:
                unfinished = Path(temporary) / "model"
                unfinished.mkdir()
                for file_name, descriptor in files.items():
                    write_blob(_chunks(self.blob_path(name, descriptor.digest)), descriptor, unfinished / file_name)
                sync(unfinished)
                unfinished.rename(to)
            sync(to.parent)
        return to

    def _entries(self, name: str) -> Sequence[Descriptor]:
        """Return the index's entries but those that other clients put there and say to be something else.

        Not every client writes the artifact's type into an index: skopeo leaves it out.
        """
        return [entry for entry in self._index(name) if entry.artifact_type in (None, ARTIFACT_TYPE)]

    def _index(self, name: str) -> Sequence[Descriptor]:
        path = self.root / check_name(name) / "index.json"
        try:
            return msgspec.json.decode(_read_limited(path, MAX_INDEX_BYTES), type=_Index).manifests
        except FileNotFoundError:
            known = ", ".join(self.names()) or "none"
            raise ModelNotFound(f"There is no model named {name} here. Names here: {known}.") from None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ArtifactInvalid(
                f"{path} is damaged ({str(error)[:200]}). Restore it from a copy, or push the models again."
            ) from error

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the lock of one name; the kernel frees it when this process ends, however it ends."""
        with _told_apart(f"The registry {self.root} cannot be written"):
            self.root.mkdir(parents=True, exist_ok=True)
            with (self.root / f".{check_name(name)}.lock").open("w") as file:
                try:
                    lock(file, LOCK_WAIT_S)
                except BlockingIOError:
                    raise RegistryError(
                        f"Another process has been writing {name} for over {LOCK_WAIT_S:.0f} s. "
                        f"If none is, look who holds {file.name} (fuser), then try again."
                    ) from None
                yield


@contextmanager
def _told_apart(what: str) -> Iterator[None]:
    """Turn an operating system's error (no room, no permission) into one that says what could not be done."""
    try:
        yield
    except OSError as error:
        raise RegistryError(f"{what}: {error}. What was there before is unchanged; mend it, then try again.") from error


def split_reference(reference: str) -> tuple[str, str, str]:
    """Return (name, tag, digest) of `name`, `name:tag` or `name@digest`; of tag and digest one is empty."""
    name, at, digest = reference.partition("@")
    if at:
        return check_name(name), "", check_digest(digest)
    name, _, tag = reference.partition(":")
    return check_name(name), check_tag(tag or DEFAULT_TAG), ""


def write_blob(chunks: Iterable[bytes], descriptor: Descriptor, to: Path) -> None:
    """Write `chunks` to the new file `to` and sync it; never more than the descriptor's size is written.

    Raises:
        ArtifactInvalid: size or SHA-256 differ from the descriptor's; `to` is gone then.
        FileExistsError: `to` is there already; it stays as it is.
    """
    digest, size = hashlib.sha256(), 0
    with to.open("xb") as file:
        try:
            for chunk in chunks:
                size += len(chunk)
                if size > descriptor.size:
                    break
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            if size != descriptor.size or f"sha256:{digest.hexdigest()}" != descriptor.digest:
                raise ArtifactInvalid(
                    f"Blob {descriptor.digest} is damaged: it does not have the {descriptor.size} bytes that its name "
                    "stands for. Get the model again from where it was pushed."
                )
        except BaseException:
            to.unlink(missing_ok=True)
            raise


def _create_layout(layout: Path) -> None:
    """Make the directories, and clear away what a killed push left; the caller holds the lock."""
    if not (layout / "blobs/sha256").exists():
        (layout / "blobs/sha256").mkdir(parents=True)
        sync(layout / "blobs")
        sync(layout.parent)
    for left in layout.glob(f"{UNFINISHED}*"):
        left.unlink()
    if not (layout / "oci-layout").exists():
        _write(layout, [LAYOUT], layout / "oci-layout")


def _write(layout: Path, chunks: Iterable[bytes], to: Path | None = None) -> tuple[str, int]:
    """Store `chunks` as `to`, or as a blob under their hash; return (digest, size). On disk when this returns."""
    digest, size = hashlib.sha256(), 0
    descriptor, temporary = tempfile.mkstemp(prefix=UNFINISHED, dir=layout)
    unfinished = Path(temporary)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                size += len(chunk)
                if size > MAX_FILE_BYTES:
                    raise ArtifactInvalid(
                        f"A file of the model has over {MAX_FILE_BYTES} bytes, the most a registry takes."
                    )
                digest.update(chunk)
                file.write(chunk)
            os.fchmod(file.fileno(), 0o644)
            file.flush()
            os.fsync(file.fileno())
        name = f"sha256:{digest.hexdigest()}"
        # A blob that is here already is replaced all the same: its content may have been damaged since.
        target = to or _blob(layout, name)
        unfinished.rename(target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(target.parent)
    return name, size


def _index_entry(digest: str, size: int, tag: str) -> Descriptor:
    return Descriptor(
        media_type=MANIFEST_TYPE, artifact_type=ARTIFACT_TYPE, digest=digest, size=size, annotations={REF_NAME: tag}
    )


def _blob(layout: Path, digest: str) -> Path:
    algorithm, _, hexadecimal = digest.partition(":")
    return layout / "blobs" / algorithm / hexadecimal


def _chunks(path: Path) -> Iterator[bytes]:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _read_limited(path: Path, limit: int) -> bytes:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            raw = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ArtifactInvalid(f"{path} cannot be read: {error}.") from error
    if len(raw) > limit:
        raise ArtifactInvalid(f"{path} has over {limit} bytes, which is more than its kind may have.")
    return raw


def _check_digest_of(raw: bytes, digest: str) -> None:
    if f"sha256:{hashlib.sha256(raw).hexdigest()}" != digest:
        raise ArtifactInvalid(f"Blob {digest} is damaged: its content has another hash. Push the model again.")
