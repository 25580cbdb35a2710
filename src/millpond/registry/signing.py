"""Sign a model directory with a P-256 key, and refuse what the key's holder did not sign.

The signature is OpenSSF model-signing's (a Sigstore bundle with an in-toto statement of every file's SHA-256) in
`model.sig`, and covers every file but itself. No network: no certificate, no transparency log, one known key.
model-signing takes about 0.6 s to import, so it is imported where it is used.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from millpond.registry.errors import RegistryError, SignatureRefused
from millpond.registry.manifest import FILES, MAX_SIGNATURE_BYTES, SIGNATURE_FILE

if TYPE_CHECKING:
    from model_signing import hashing

MAX_KEY_BYTES = 16 * 1024
SIGNED_FILES = frozenset(FILES) - {SIGNATURE_FILE}


# What is read of a Sigstore bundle (`_Bundle`) and of the in-toto statement in it (`_Statement`) before and after
# model-signing has its say: whose key it names, and which files it covers.


class _PublicKey(msgspec.Struct, frozen=True):
    hint: str


class _VerificationMaterial(msgspec.Struct, frozen=True, rename="camel"):
    public_key: _PublicKey


class _Envelope(msgspec.Struct, frozen=True, rename="camel"):
    payload: bytes
    signatures: Annotated[list[msgspec.Raw], Meta(min_length=1, max_length=1)]


class _Bundle(msgspec.Struct, frozen=True, rename="camel"):
    media_type: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"]
    verification_material: _VerificationMaterial
    dsse_envelope: _Envelope


class _Resource(msgspec.Struct, frozen=True):
    name: str


class _Predicate(msgspec.Struct, frozen=True):
    resources: Annotated[list[_Resource], Meta(max_length=len(FILES))]


class _Statement(msgspec.Struct, frozen=True, rename="camel"):
    predicate_type: Literal["https://model_signing/signature/v1.0"]
    predicate: _Predicate


def generate_key_pair(private_path: Path, public_path: Path) -> None:
    """Write a new P-256 key pair as PEM; the private file is readable by its owner alone.

    Raises:
        RegistryError: one of the files exists already (models signed with it would be lost), or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    for path in (private_path, public_path):
        if path.exists():
            raise RegistryError(
                f"{path} exists already and is not overwritten: edges may trust it. Move it away first."
            )
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        _write_new(private_path, private, 0o600)
        _write_new(public_path, public, 0o644)
    except OSError as error:
        raise RegistryError(f"The key pair cannot be written: {error}. Choose another place, or make room.") from error


def sign(model_dir: Path, private_key: Path) -> Path:
    """Sign every file of `model_dir` and return the path of `model.sig`; a signature already there is replaced.

    Raises:
        RegistryError: the key cannot be used, or the directory does not hold exactly a model's files.
    """
    from model_signing import signing

    found = _list_files(model_dir)
    if found - {SIGNATURE_FILE} != SIGNED_FILES:
        raise RegistryError(f"{model_dir} cannot be signed: {_difference(found - {SIGNATURE_FILE})}")
    signature = model_dir / SIGNATURE_FILE
    try:
        config = signing.Config().set_hashing_config(_hashing()).use_elliptic_key_signer(private_key=private_key)
        config.sign(model_dir, signature)
    except (ValueError, TypeError, OSError) as error:
        raise RegistryError(f"{model_dir} cannot be signed with {private_key}: {error}") from error
    return signature


def verify(model_dir: Path, public_key: Path) -> None:
    """Return if `model.sig` shows that the holder of `public_key`'s other half signed exactly these files.

    Raises:
        SignatureRefused: a file is missing, additional or changed, the signature is malformed, or by another key.
        RegistryError: the public key cannot be read.
    """
    fingerprint = _fingerprint(public_key)
    found = _list_files(model_dir)
    if SIGNATURE_FILE not in found:
        raise SignatureRefused("the model is not signed.")
    if found - {SIGNATURE_FILE} != SIGNED_FILES:
        raise SignatureRefused(_difference(found - {SIGNATURE_FILE}))
    try:
        bundle = msgspec.json.decode(_read_limited(model_dir / SIGNATURE_FILE, MAX_SIGNATURE_BYTES), type=_Bundle)
        statement = msgspec.json.decode(bundle.dsse_envelope.payload, type=_Statement)
    except (msgspec.MsgspecError, OSError, ValueError, RecursionError) as error:
        raise SignatureRefused(f"the signature is malformed ({str(error)[:200]}).") from error
    if bundle.verification_material.public_key.hint != fingerprint:
        raise SignatureRefused("another key than ours signed this model.")
    # A signature may name files to ignore; ours never does, so one that covers less than everything is refused.
    if sorted(resource.name for resource in statement.predicate.resources) != sorted(SIGNED_FILES):
        raise SignatureRefused("the signature does not cover every file of the model.")
    _verify_with_model_signing(model_dir, public_key)


def _verify_with_model_signing(model_dir: Path, public_key: Path) -> None:
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    config = verifying.Config().set_hashing_config(_hashing()).use_elliptic_key_verifier(public_key=public_key)
    try:
        config.verify(model_dir, model_dir / SIGNATURE_FILE)
    except InvalidSignature as error:
        raise SignatureRefused("the signature was not made by our key, or was changed after.") from error
    except ValueError as error:
        found = str(error).removeprefix("Signature mismatch: ")[:300]
        raise SignatureRefused(f"the files are not those that were signed: {found}.") from error
    except Exception as error:  # whatever a hostile signature makes the parsers below raise, it is not verified
        raise SignatureRefused(f"the signature is malformed ({str(error)[:200]}).") from error


def _hashing() -> hashing.Config:
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[SIGNATURE_FILE], ignore_git_paths=False)


def _fingerprint(public_key: Path) -> str:
    """Return what model-signing calls a key in a signature: SHA-256 of its PEM, in hexadecimal."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(_read_limited(public_key, MAX_KEY_BYTES))
    except (OSError, ValueError) as error:
        raise RegistryError(
            f"The public key {public_key} cannot be read: {error}. Copy it from the site that signs the models."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise RegistryError(f"{public_key} is no elliptic-curve key. Make a pair with: millpond registry keygen")
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _list_files(model_dir: Path) -> set[str]:
    """Return the names in `model_dir`; a link or a directory among them is named with what it is."""
    try:
        return {
            entry.name if entry.is_file(follow_symlinks=False) else f"{entry.name} (not a plain file)"
            for entry in os.scandir(model_dir)
        }
    except OSError as error:
        raise RegistryError(f"The model directory {model_dir} cannot be read: {error}.") from error


def _difference(found: set[str]) -> str:
    missing, additional = sorted(SIGNED_FILES - found), sorted(found - SIGNED_FILES)
    parts = [f"{', '.join(missing)} missing"] * bool(missing) + [f"{', '.join(additional)} additional"] * bool(
        additional
    )
    return f"it does not hold a model's files ({'; '.join(parts)[:300]})."


def _read_limited(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"over {limit} bytes")
    return raw


def _write_new(path: Path, content: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
