"""The model artifact: its files, its config, and the OCI image manifest that ties them together.

Promises that what `parse_manifest` and `parse_config` return is complete and within limits: exactly our files,
each once, under its own media type, no path in a name. Knows no disk and no network.
Source: OCI image specification 1.1, manifest.md, "Guidelines for Artifact Usage".
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from millpond.registry.errors import ArtifactInvalid, RegistryError
from millpond.schema import Identifier, Label

T = TypeVar("T")

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE: Final = "application/vnd.millpond.model.v1"
CONFIG_TYPE = "application/vnd.millpond.model.config.v1+json"

CONFIG_FILE = "config.json"
SIGNATURE_FILE = "model.sig"
LAYER_TYPES = {
    "weights.safetensors": "application/vnd.millpond.model.weights.v1.safetensors",
    "model.onnx": "application/vnd.millpond.model.graph.v1.onnx",
    "tokenizer.json": "application/vnd.millpond.model.tokenizer.v1+json",
    "golden.jsonl": "application/vnd.millpond.model.golden.v1.jsonl",
    SIGNATURE_FILE: "application/vnd.dev.sigstore.bundle.v0.3+json",
}
"""File name → media type of its layer, in the order of the layers. `config.json` is the manifest's config."""
FILES = (CONFIG_FILE, *LAYER_TYPES)
"""Every file of a model directory, and nothing else."""

TITLE = "org.opencontainers.image.title"
REF_NAME = "org.opencontainers.image.ref.name"

MAX_MANIFEST_BYTES = 64 * 1024
MAX_CONFIG_BYTES = 256 * 1024
MAX_SIGNATURE_BYTES = 256 * 1024
MAX_FILE_BYTES = 4 * 1024**3
MAX_LABELS = 1000

_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")  # one component of a name, OCI distribution spec
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_VERSION = re.compile(r"v[1-9][0-9]{0,8}")
MAX_NAME_LENGTH = 128

Name = Annotated[str, Meta(pattern=rf"^{_NAME.pattern}$(?!\n)", max_length=MAX_NAME_LENGTH)]
Version = Annotated[str, Meta(pattern=rf"^{_VERSION.pattern}$(?!\n)")]
Digest = Annotated[str, Meta(pattern=rf"^{_DIGEST.pattern}$(?!\n)")]
Size = Annotated[int, Meta(ge=0, le=MAX_FILE_BYTES)]


class _Struct(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Names as OCI spells them; fields that are not known are ignored, as OCI asks."""


class Descriptor(_Struct, frozen=True, kw_only=True):
    """What a manifest or an index says about a blob: its type, digest and size in bytes."""

    media_type: str
    digest: Digest
    size: Size
    artifact_type: str | None = None
    annotations: dict[str, str] = {}


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An OCI image manifest that carries one model."""

    schema_version: Literal[2]
    media_type: Literal["application/vnd.oci.image.manifest.v1+json"]
    artifact_type: Literal["application/vnd.millpond.model.v1"]
    config: Descriptor
    layers: Annotated[list[Descriptor], Meta(min_length=len(LAYER_TYPES), max_length=len(LAYER_TYPES))]
    annotations: dict[str, str] = {}

    def files(self) -> dict[str, Descriptor]:
        """Return file name → descriptor, `config.json` first; the names are those of `FILES`, never a path."""
        return {CONFIG_FILE: self.config} | {layer.annotations[TITLE]: layer for layer in self.layers}


class DataSource(msgspec.Struct, frozen=True, kw_only=True):
    """A corpus that a model was trained or measured on."""

    name: str
    digest: str
    rows: int
    role: str
    """`train`, `test`, `corrections`, `heldout`, `teacher` or `unlabelled`."""


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model comes from."""

    parent: str | None = None
    """Manifest digest of the champion that it was to replace."""
    corrections: int = 0
    seed: int = 0
    dropped_leaks: int = 0
    """Training rows of the corpus left out because their text is in the test split."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`config.json`: what the model is, what it was made of, how good it is."""

    name: Name
    version: Version
    labels: Annotated[list[Label], Meta(min_length=2, max_length=MAX_LABELS)]
    architecture: Identifier
    task: Literal["text-classification"] = "text-classification"
    options: dict[str, bool | int | float | str] = {}
    """Sizes of the architecture."""
    text: dict[str, bool | int | float | str] = {}
    """What `millpond.text` needs besides `tokenizer.json`; the registry does not look into it."""
    floats_per_id: Annotated[int, Meta(ge=1)] = 256
    """Numbers that the graph computes for each id of a text, which bounds how many an edge gives it at once."""
    metrics: dict[str, float] = {}
    data: list[DataSource] = []
    lineage: Lineage = Lineage()
    code_version: str = ""
    created: str = ""
    """RFC 3339, UTC."""


def parse_manifest(raw: bytes) -> Manifest:
    """Return the manifest in `raw`, checked whole.

    Raises:
        ArtifactInvalid: too long, not JSON, a wrong media type, a missing, additional or repeated file, a bad digest
            or size.
    """
    manifest = _decode(raw, Manifest, "manifest", MAX_MANIFEST_BYTES)
    if manifest.config.media_type != CONFIG_TYPE:
        raise ArtifactInvalid(
            f"The manifest's config is {manifest.config.media_type!r}, not {CONFIG_TYPE!r}: no model of ours."
        )
    if manifest.config.size > MAX_CONFIG_BYTES:
        raise ArtifactInvalid(
            f"The manifest's config has {manifest.config.size} bytes; at most {MAX_CONFIG_BYTES} are read."
        )
    for layer in manifest.layers:
        title = layer.annotations.get(TITLE, "")
        if LAYER_TYPES.get(title) != layer.media_type:
            raise ArtifactInvalid(
                f"The manifest has a layer {title[:100]!r} of type {layer.media_type[:100]!r}, which no model has."
            )
    if len(manifest.files()) != len(FILES):
        raise ArtifactInvalid("The manifest names the same file twice.")
    return manifest


def parse_config(raw: bytes) -> ModelConfig:
    """Return the model's config in `raw`.

    Raises:
        ArtifactInvalid: too long, not JSON, a field of a wrong type, a label twice.
    """
    config = _decode(raw, ModelConfig, CONFIG_FILE, MAX_CONFIG_BYTES)
    if len(set(config.labels)) != len(config.labels):
        raise ArtifactInvalid(f"{CONFIG_FILE} names a label twice; each class needs its own.")
    return config


def build_manifest(config: ModelConfig, files: dict[str, tuple[str, int]]) -> bytes:
    """Return the manifest's bytes for `files` (name → digest, size in bytes); the same input gives the same bytes."""
    layers = [
        Descriptor(media_type=media_type, digest=files[name][0], size=files[name][1], annotations={TITLE: name})
        for name, media_type in LAYER_TYPES.items()
    ]
    digest, size = files[CONFIG_FILE]
    annotations = {TITLE: config.name, "org.opencontainers.image.version": config.version}
    if config.created:
        annotations["org.opencontainers.image.created"] = config.created
    return msgspec.json.encode(
        Manifest(
            schema_version=2,
            media_type=MANIFEST_TYPE,
            artifact_type=ARTIFACT_TYPE,
            config=Descriptor(media_type=CONFIG_TYPE, digest=digest, size=size),
            layers=layers,
            annotations=annotations,
        )
    )


def is_name(name: str) -> bool:
    """Return whether `name` can be a model's name, and so a directory's."""
    return len(name) <= MAX_NAME_LENGTH and _NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """Return `name` if it can be a model's name; raises RegistryError."""
    if not is_name(name):
        raise RegistryError(
            f"{name[:200]!r} cannot be a model's name: use a–z, 0–9, and single '.', '_' or '-' between them."
        )
    return name


def check_tag(tag: str) -> str:
    """Return `tag` if it can be a tag; raises RegistryError."""
    if not _TAG.fullmatch(tag):
        raise RegistryError(f"{tag[:200]!r} cannot be a tag: use letters, digits, '.', '_', '-', at most 128 of them.")
    return tag


def check_digest(digest: str) -> str:
    """Return `digest` if it is sha256 and 64 hexadecimal digits; raises RegistryError."""
    if not _DIGEST.fullmatch(digest):
        raise RegistryError(
            f"{digest[:200]!r} is not a digest: it must be 'sha256:' and 64 hexadecimal digits in lower case."
        )
    return digest


def is_version(tag: str) -> bool:
    """Return whether a tag is a version (`v7`): those never move."""
    return _VERSION.fullmatch(tag) is not None


def _decode(raw: bytes, kind: type[T], what: str, limit: int) -> T:
    if len(raw) > limit:
        raise ArtifactInvalid(f"The {what} has {len(raw)} bytes; at most {limit} are read.")
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ArtifactInvalid(f"The {what} is not what it must be: {str(error)[:300]}") from error
