"""Hostile and damaged models: whatever is in a registry or comes down the wire, nothing half-true is handed out."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from millpond.registry import (
    ArtifactInvalid,
    Descriptor,
    RegistryError,
    SignatureRefused,
    Store,
    generate_key_pair,
    parse_config,
    parse_manifest,
    sign,
    verify,
    write_blob,
)
from millpond.registry.manifest import MAX_CONFIG_BYTES, MAX_FILE_BYTES, MAX_MANIFEST_BYTES

CONFIG = {
    "name": "sentiment",
    "version": "v1",
    "labels": ["negative", "positive"],
    "architecture": "ngram",
    "created": "2026-01-02T03:04:05Z",
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    directory = tmp_path_factory.mktemp("keys")
    generate_key_pair(directory / "a.key", directory / "a.pub")
    return directory / "a.key", directory / "a.pub"


def _write_model(directory, keys, version="v1", weights=b"w" * 5000):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | {"version": version}))
    (directory / "weights.safetensors").write_bytes(weights)
    (directory / "model.onnx").write_bytes(b"graph")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "golden.jsonl").write_text("{}\n")
    sign(directory, keys[0])
    return directory


@pytest.fixture
def model_dir(tmp_path, keys):
    return _write_model(tmp_path / "model", keys)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "registry")


@pytest.fixture
def pushed(store, model_dir):
    return store.push(model_dir, ["champion"])


@pytest.fixture
def manifest(store, pushed):
    return json.loads(store.manifest_bytes("sentiment", pushed.digest))


def _bytes(document):
    return json.dumps(document).encode()


# --- manifests ---------------------------------------------------------------------------------------------------


def _edit_layer(manifest, **changes):
    layers = [dict(layer) for layer in manifest["layers"]]
    layers[0] |= changes
    return manifest | {"layers": layers}


def _title(title):
    return {"annotations": {"org.opencontainers.image.title": title}}


@pytest.mark.parametrize(
    "title",
    [
        "../x",
        "/etc/passwd",
        "..",
        "",
        "weights.safetensors\0",
        "weights.safetensors\n",
        "a/weights.safetensors",
        "Weights.safetensors",
        "config.json",
        "model.onnx",
        "evil.py",
        "x" * 10_000,
    ],
)
def test_title_that_is_no_file_of_ours_is_refused(manifest, title):
    with pytest.raises(ArtifactInvalid) as refusal:
        parse_manifest(_bytes(_edit_layer(manifest, **_title(title))))
    assert len(str(refusal.value)) < 500


def test_title_twice_is_refused(manifest):
    twice = manifest | {"layers": [manifest["layers"][0], *manifest["layers"][:-1]]}
    with pytest.raises(ArtifactInvalid, match="twice"):
        parse_manifest(_bytes(twice))


@pytest.mark.parametrize("count", [0, 1, 4, 6, 10_000])
def test_other_number_of_layers_is_refused(manifest, count):
    layers = (manifest["layers"] * count)[:count]
    with pytest.raises(ArtifactInvalid):
        parse_manifest(_bytes(manifest | {"layers": layers}))


def test_ten_thousand_small_layers_are_refused_at_once():
    raw = b'{"layers":[' + b"{}," * 20_000 + b"{}]}"
    assert len(raw) < MAX_MANIFEST_BYTES
    with pytest.raises(ArtifactInvalid):
        parse_manifest(raw)


@pytest.mark.parametrize("size", [-1, MAX_FILE_BYTES + 1, 2**63, 2**200, 1.5, "5000", None, True])
def test_size_that_cannot_be_is_refused(manifest, size):
    with pytest.raises(ArtifactInvalid):
        parse_manifest(_bytes(_edit_layer(manifest, size=size)))


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "sha256:",
        "sha256:../../etc",
        "sha512:" + "0" * 128,
        "sha256:" + "g" * 64,
        "sha256:" + "0" * 64 + "\n",
        7,
        None,
    ],
)
def test_digest_that_cannot_be_is_refused(manifest, digest):
    with pytest.raises(ArtifactInvalid):
        parse_manifest(_bytes(_edit_layer(manifest, digest=digest)))


@pytest.mark.parametrize(
    "changes",
    [
        {"mediaType": "application/vnd.docker.distribution.manifest.v2+json"},
        {"mediaType": "application/vnd.oci.image.index.v1+json"},
        {"artifactType": "application/vnd.unknown.artifact.v1"},
        {"artifactType": None},
        {"schemaVersion": 1},
        {"schemaVersion": "2"},
        {"layers": {}},
        {"layers": None},
        {"config": None},
        {"annotations": {"a": 1}},
    ],
)
def test_manifest_of_another_kind_is_refused(manifest, changes):
    with pytest.raises(ArtifactInvalid):
        parse_manifest(_bytes(manifest | changes))


def test_other_media_types_are_refused(manifest):
    with pytest.raises(ArtifactInvalid, match="which no model has"):
        parse_manifest(_bytes(_edit_layer(manifest, mediaType="application/vnd.oci.image.layer.v1.tar")))
    config = manifest["config"] | {"mediaType": "application/vnd.oci.image.config.v1+json"}
    with pytest.raises(ArtifactInvalid, match="no model of ours"):
        parse_manifest(_bytes(manifest | {"config": config}))
    with pytest.raises(ArtifactInvalid, match="at most"):
        parse_manifest(_bytes(manifest | {"config": manifest["config"] | {"size": MAX_CONFIG_BYTES + 1}}))


BOMBS = [
    b"",
    b"null",
    b"[]",
    b"\xff\xfe\x00",
    b"{",
    b'{"schemaVersion": NaN}',
    b"[" * 30_000,
    b'{"a":' * 10_000,
    b'{"layers":' + b"[" * 30_000,
    b'{"x":"' + b"\\u0000" * 5000 + b'"}',
    b"9" * 60_000,
    b'{"unknown":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
]


@pytest.mark.parametrize("raw", BOMBS, ids=range(len(BOMBS)))
def test_json_bombs_are_refused(raw):
    for parse in (parse_manifest, parse_config):
        with pytest.raises(ArtifactInvalid):
            parse(raw)


def test_too_long_documents_are_refused_unread():
    with pytest.raises(ArtifactInvalid, match="at most"):
        parse_manifest(b"{" * (MAX_MANIFEST_BYTES + 1))
    with pytest.raises(ArtifactInvalid, match="at most"):
        parse_config(b"{" * (MAX_CONFIG_BYTES + 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../sentiment"},
        {"name": "Sentiment"},
        {"name": "sentiment\n"},
        {"name": "a" * 200},
        {"version": "7"},
        {"version": "v0"},
        {"version": "v1\n"},
        {"version": "latest"},
        {"labels": []},
        {"labels": ["one"]},
        {"labels": ["same", "same"]},
        {"labels": ["", "x"]},
        {"labels": [f"label {n}" for n in range(1001)]},
        {"labels": "positive"},
        {"task": "object-detection"},
        {"architecture": "n gram"},
        {"options": {"a": [1]}},
        {"metrics": {"accuracy": "high"}},
        {"lineage": []},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_config_that_no_model_has_is_refused(changes):
    with pytest.raises(ArtifactInvalid):
        parse_config(_bytes(CONFIG | changes))


# --- blobs from elsewhere ----------------------------------------------------------------------------------------


def _descriptor(content):
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return Descriptor(media_type="application/octet-stream", digest=digest, size=len(content))


def test_blob_longer_than_announced_is_never_written_out(tmp_path):
    def endless():
        while True:
            yield b"x" * 1000

    with pytest.raises(ArtifactInvalid, match="damaged"):
        write_blob(endless(), _descriptor(b"x" * 10_000), tmp_path / "blob")
    assert not (tmp_path / "blob").exists()


@pytest.mark.parametrize("content", [b"", b"right conten", b"wrong content", b"right content!"])
def test_blob_of_other_size_or_hash_is_gone(tmp_path, content):
    with pytest.raises(ArtifactInvalid, match="damaged"):
        write_blob([content], _descriptor(b"right content"), tmp_path / "blob")
    assert not (tmp_path / "blob").exists()


def test_blob_never_overwrites_a_file(tmp_path):
    (tmp_path / "blob").write_text("mine")
    with pytest.raises(FileExistsError):
        write_blob([b"x"], _descriptor(b"x"), tmp_path / "blob")
    assert (tmp_path / "blob").read_text() == "mine"


# --- a damaged registry ------------------------------------------------------------------------------------------


def _blobs(store):
    return sorted((store.root / "sentiment/blobs/sha256").iterdir())


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("damage", ["one byte", "truncated", "missing", "link", "longer"])
def test_damage_to_any_blob_is_found(store, pushed, tmp_path, number, damage):
    blob = _blobs(store)[number]
    content = blob.read_bytes()
    if damage == "one byte":
        blob.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "truncated":
        blob.write_bytes(content[:-1])
    elif damage == "longer":
        blob.write_bytes(content + b"\0")
    else:
        moved = blob.rename(tmp_path / "moved")
        if damage == "link":
            blob.symlink_to(moved)
    with pytest.raises(RegistryError):
        store.checkout("sentiment", pushed.digest, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".unfinished-*"))


def test_exchanged_blobs_are_found_by_the_hash(store, pushed, manifest, tmp_path):
    first, second = (store.blob_path("sentiment", manifest["layers"][n]["digest"]) for n in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(ArtifactInvalid, match="damaged"):
        store.checkout("sentiment", pushed.digest, tmp_path / "out")


def test_manifest_rewritten_to_another_model_needs_another_signature(store, pushed, model_dir, keys, tmp_path):
    """An attacker who can write the whole registry, hashes and all, still cannot sign."""
    weights = model_dir / "weights.safetensors"
    weights.write_bytes(b"evil" * 1250)
    (model_dir / "config.json").write_text(json.dumps(CONFIG | {"version": "v2"}))
    forged = store.push(model_dir, ["champion"])
    out = store.checkout("sentiment", forged.digest, tmp_path / "out")
    with pytest.raises(SignatureRefused, match="not those that were signed"):
        verify(out, keys[1])


def test_model_signed_by_another_key_is_refused(store, tmp_path, keys):
    generate_key_pair(tmp_path / "b.key", tmp_path / "b.pub")
    other = _write_model(tmp_path / "other", (tmp_path / "b.key", tmp_path / "b.pub"))
    pushed = store.push(other)
    out = store.checkout("sentiment", pushed.digest, tmp_path / "out")
    verify(out, tmp_path / "b.pub")
    with pytest.raises(SignatureRefused, match="another key"):
        verify(out, keys[1])


@pytest.mark.parametrize("raw", BOMBS, ids=range(len(BOMBS)))
def test_damaged_index_gets_a_clear_error(store, pushed, raw):
    (store.root / "sentiment/index.json").write_bytes(raw)
    for act in (
        lambda: store.resolve("sentiment:champion"),
        lambda: store.list("sentiment"),
        lambda: store.tags("sentiment"),
    ):
        with pytest.raises(ArtifactInvalid, match="damaged"):
            act()


@pytest.mark.parametrize(
    "entry",
    [
        {"digest": "sha256:../../../etc/passwd"},
        {"digest": "sha512:" + "0" * 128},
        {"size": -5},
        {"annotations": {"org.opencontainers.image.ref.name": 5}},
    ],
)
def test_hostile_entry_in_the_index_is_refused(store, pushed, entry):
    path = store.root / "sentiment/index.json"
    index = json.loads(path.read_text())
    index["manifests"][0] |= entry
    path.write_text(json.dumps(index))
    with pytest.raises(ArtifactInvalid, match="damaged"):
        store.resolve("sentiment:champion")


def test_index_that_is_a_link_is_refused(store, pushed, tmp_path):
    path = store.root / "sentiment/index.json"
    path.rename(tmp_path / "index.json")
    path.symlink_to(tmp_path / "index.json")
    with pytest.raises(ArtifactInvalid, match="cannot be read"):
        store.resolve("sentiment:champion")


def test_index_that_names_a_blob_as_manifest_is_refused(store, pushed, manifest, tmp_path):
    path = store.root / "sentiment/index.json"
    index = json.loads(path.read_text())
    weights = manifest["layers"][0]
    for entry in index["manifests"]:
        entry |= {"digest": weights["digest"], "size": weights["size"]}
    path.write_text(json.dumps(index))
    with pytest.raises(ArtifactInvalid, match="manifest"):
        store.checkout("sentiment", store.resolve("sentiment:champion"), tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors", "model.sig"])
def test_link_in_a_model_directory_is_not_followed(store, model_dir, tmp_path, name):
    secret = tmp_path / "secret"
    (model_dir / name).rename(secret)
    (model_dir / name).symlink_to(secret)
    with pytest.raises(ArtifactInvalid, match=f"{name} missing"):
        store.push(model_dir)


def test_file_beside_the_models_files_never_travels(store, model_dir, tmp_path):
    (model_dir / "id_rsa").write_text("secret")
    pushed = store.push(model_dir)
    out = store.checkout("sentiment", pushed.digest, tmp_path / "out")
    assert not (out / "id_rsa").exists()


# --- death in the middle -----------------------------------------------------------------------------------------

PUSHER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from millpond.registry import Store
    store = Store(Path(sys.argv[1]))
    print("ready", flush=True)
    for model_dir in sys.argv[2:]:
        store.push(Path(model_dir), ["champion"])
        print("pushed", flush=True)
""")


def _start_pusher(store, *directories):
    command = [sys.executable, "-c", PUSHER, str(store.root), *map(str, directories)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _check_whole(store, tmp_path, keys, name):
    out = store.checkout("sentiment", store.resolve("sentiment:champion"), tmp_path / name)
    verify(out, keys[1])


def test_push_killed_at_any_moment_leaves_the_store_whole(store, pushed, tmp_path, keys):
    killed_in_the_middle = 0
    for attempt in range(7):
        directory = _write_model(tmp_path / f"m{attempt}", keys, f"v{attempt + 2}", weights=os.urandom(20_000_000))
        process = _start_pusher(store, directory)
        deadline = time.monotonic() + 0.006 * attempt
        while time.monotonic() < deadline:
            continue
        process.send_signal(signal.SIGKILL)
        output = process.communicate(timeout=30)[0]
        left = list((store.root / "sentiment").glob(".unfinished-*"))
        killed_in_the_middle += bool(left)
        if "pushed" in output:
            assert store.resolve("sentiment") == store.resolve(f"sentiment:v{attempt + 2}")
        _check_whole(store, tmp_path, keys, f"out{attempt}")
    assert killed_in_the_middle, "no push was caught half-way, so this showed nothing"
    final = _write_model(tmp_path / "final", keys, "v99")
    assert store.push(final, ["champion"]).digest == store.resolve("sentiment")
    assert not list((store.root / "sentiment").glob(".unfinished-*"))
    _check_whole(store, tmp_path, keys, "last")


def test_readers_never_see_half_a_push(store, pushed, tmp_path, keys):
    directories = [_write_model(tmp_path / f"m{n}", keys, f"v{n}", weights=os.urandom(2_000_000)) for n in range(2, 12)]
    process = _start_pusher(store, *directories)
    seen, looks = set(), 0
    while process.poll() is None:
        digest = store.resolve("sentiment:champion")
        store.checkout("sentiment", digest, tmp_path / f"look{looks}")
        seen.add(digest)
        looks += 1
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(seen) > 1
    assert store.describe("sentiment", store.resolve("sentiment")).version == "v11"
