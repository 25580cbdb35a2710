import base64
import json
import os
import stat
import subprocess
import sys
import textwrap

import pytest

from millpond.registry import RegistryError, SignatureRefused, generate_key_pair, sign, verify
from millpond.registry.manifest import FILES


def test_signed_model_is_verified_wherever_it_lies(make_model, keys, tmp_path):
    moved = tmp_path / "elsewhere"
    make_model().rename(moved)
    verify(moved, keys[1])


@pytest.mark.parametrize("name", [name for name in FILES if name != "model.sig"])
def test_changed_byte_in_any_file_is_refused(make_model, keys, name):
    path = make_model() / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(SignatureRefused, match=f"not those that were signed.*{name}") as refusal:
        verify(path.parent, keys[1])
    assert refusal.value.reason in str(refusal.value)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_refused(make_model, keys, name):
    model_dir = make_model()
    (model_dir / name).unlink()
    with pytest.raises(SignatureRefused, match="not signed" if name == "model.sig" else f"{name} missing"):
        verify(model_dir, keys[1])


@pytest.mark.parametrize("name", ["more.bin", ".gitignore", ".git", "pickle.pkl"])
def test_additional_file_is_refused(make_model, keys, name):
    model_dir = make_model()
    (model_dir / name).write_text("extra")
    with pytest.raises(SignatureRefused, match="additional"):
        verify(model_dir, keys[1])


def test_link_in_place_of_a_file_is_refused(make_model, keys, tmp_path):
    model_dir = make_model()
    (model_dir / "model.onnx").rename(tmp_path / "model.onnx")
    (model_dir / "model.onnx").symlink_to(tmp_path / "model.onnx")
    with pytest.raises(SignatureRefused, match="not a plain file"):
        verify(model_dir, keys[1])


def test_other_key_is_refused(make_model, tmp_path):
    generate_key_pair(tmp_path / "a.key", tmp_path / "a.pub")
    with pytest.raises(SignatureRefused, match="another key than ours"):
        verify(make_model(), tmp_path / "a.pub")


def test_any_change_of_meaning_in_the_signature_is_refused(make_model, keys):
    path = make_model() / "model.sig"
    original = path.read_bytes()
    tried = 0
    for place in [*range(0, len(original), 31), *range(len(original) - 200, len(original), 3)]:
        changed = bytearray(original)
        changed[place] ^= 1
        if _meaning(bytes(changed)) == _meaning(original):
            continue  # bits of base64 that stand for nothing
        tried += 1
        path.write_bytes(changed)
        with pytest.raises(SignatureRefused):
            verify(path.parent, keys[1])
    assert tried > 100


def _meaning(signature: bytes) -> object:
    try:
        bundle = json.loads(signature)
        bundle["dsseEnvelope"]["payload"] = base64.b64decode(bundle["dsseEnvelope"]["payload"])
        bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64decode(
            bundle["dsseEnvelope"]["signatures"][0]["sig"]
        )
    except (ValueError, KeyError):
        return None
    return bundle


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, b"{" * 10, b'{"a":' * 50_000, b"x" * 300_000]
)
def test_malformed_signature_is_refused(make_model, keys, content):
    path = make_model() / "model.sig"
    path.write_bytes(content)
    with pytest.raises(SignatureRefused, match="malformed"):
        verify(path.parent, keys[1])


def test_signature_that_leaves_a_file_out_is_refused(make_model, keys):
    """model-signing lets a signer name files to ignore; our own key must not sign away a file."""
    from model_signing import hashing, signing

    model_dir = make_model(signed=False)
    hash_config = hashing.Config().set_ignored_paths(paths=["model.sig", "weights.safetensors"], ignore_git_paths=False)
    config = signing.Config().set_hashing_config(hash_config).use_elliptic_key_signer(private_key=keys[0])
    config.sign(model_dir, model_dir / "model.sig")
    with pytest.raises(SignatureRefused, match="does not cover every file"):
        verify(model_dir, keys[1])


def test_signature_of_another_model_is_refused(make_model, keys):
    first, second = make_model("v1"), make_model("v2")
    (first / "model.sig").write_bytes((second / "model.sig").read_bytes())
    with pytest.raises(SignatureRefused, match="not those that were signed"):
        verify(first, keys[1])


def test_private_key_is_for_its_owner_alone_and_never_overwritten(tmp_path):
    private, public = tmp_path / "keys/signing.key", tmp_path / "keys/signing.pub"
    generate_key_pair(private, public)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    with pytest.raises(RegistryError, match="exists already"):
        generate_key_pair(private, tmp_path / "other.pub")
    assert private.read_bytes() == before
    assert not (tmp_path / "other.pub").exists()


def test_key_that_is_no_key_gets_a_clear_error(make_model, keys, tmp_path):
    model_dir = make_model()
    (tmp_path / "bad.pub").write_text("hello")
    with pytest.raises(RegistryError, match="cannot be read"):
        verify(model_dir, tmp_path / "bad.pub")
    with pytest.raises(RegistryError, match="cannot be read"):
        verify(model_dir, tmp_path / "missing.pub")
    with pytest.raises(RegistryError, match="cannot be signed"):
        sign(model_dir, tmp_path / "missing.key")
    with pytest.raises(RegistryError, match="cannot be signed"):
        sign(model_dir, keys[1])


def test_ed25519_key_is_refused_with_advice(make_model, tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = Ed25519PrivateKey.generate().public_key()
    (tmp_path / "ed.pub").write_bytes(
        public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(RegistryError, match="keygen"):
        verify(make_model(), tmp_path / "ed.pub")


def test_directory_with_other_files_is_not_signed(make_model, keys):
    model_dir = make_model(signed=False)
    (model_dir / "notes.txt").write_text("x")
    with pytest.raises(RegistryError, match=r"notes\.txt additional"):
        sign(model_dir, keys[0])


AUDITED = textwrap.dedent("""
    import sys
    from pathlib import Path
    network = ("socket.connect", "socket.getaddrinfo", "socket.sendto")
    sys.addaudithook(lambda event, args: event in network and sys.exit(f"{event} {args}"))
    import millpond.registry as registry
    assert "model_signing" not in sys.modules, "model-signing is slow to import; only sign and verify may need it"
    assert "torch" not in sys.modules
    registry.sign(Path(sys.argv[1]), Path(sys.argv[2]))
    registry.verify(Path(sys.argv[1]), Path(sys.argv[3]))
""")


def test_signing_touches_no_network_and_importing_stays_light(make_model, keys):
    environ = os.environ | {"HTTPS_PROXY": "", "HTTP_PROXY": ""}
    command = [sys.executable, "-c", AUDITED, str(make_model(signed=False)), *map(str, keys)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
