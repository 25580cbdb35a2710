import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest

from millpond.registry import ArtifactInvalid, ModelNotFound, RegistryError, Store, verify
from millpond.registry.manifest import FILES, LAYER_TYPES


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "registry")


def test_pushed_model_comes_back_byte_for_byte(store, make_model, tmp_path, keys):
    model_dir = make_model()
    pushed = store.push(model_dir, ["champion"])
    back = store.checkout("sentiment", store.resolve("sentiment:champion"), tmp_path / "back")
    assert {path.name: path.read_bytes() for path in back.iterdir()} == {
        path.name: path.read_bytes() for path in model_dir.iterdir()
    }
    verify(back, keys[1])
    assert pushed.version == "v1"
    assert pushed.tags == ["champion", "v1"]
    assert pushed.metrics == {"test_accuracy": 0.9}
    assert pushed.size_bytes == sum(path.stat().st_size for path in model_dir.iterdir())


def test_layout_is_what_the_oci_image_specification_asks_for(store, make_model):
    pushed = store.push(make_model(), ["champion"])
    layout = store.root / "sentiment"
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((layout / "index.json").read_text())
    assert index["schemaVersion"] == 2
    assert index["mediaType"] == "application/vnd.oci.image.index.v1+json"
    assert [entry["annotations"]["org.opencontainers.image.ref.name"] for entry in index["manifests"]] == [
        "champion",
        "v1",
    ]
    for entry in index["manifests"]:
        assert set(entry) == {"mediaType", "artifactType", "digest", "size", "annotations"}
        assert entry["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
        assert entry["digest"] == pushed.digest
    manifest = json.loads(_blob(layout, pushed.digest))
    assert index["manifests"][0]["size"] == len(_blob(layout, pushed.digest))
    assert manifest["schemaVersion"] == 2
    assert manifest["artifactType"] == "application/vnd.millpond.model.v1"
    titles = [layer["annotations"]["org.opencontainers.image.title"] for layer in manifest["layers"]]
    assert titles == list(LAYER_TYPES)
    for descriptor in [manifest["config"], *manifest["layers"]]:
        content = _blob(layout, descriptor["digest"])
        assert len(content) == descriptor["size"]
        assert f"sha256:{hashlib.sha256(content).hexdigest()}" == descriptor["digest"]
    assert {path.name for path in layout.iterdir()} == {"oci-layout", "index.json", "blobs"}
    assert len(list((layout / "blobs/sha256").iterdir())) == len(FILES) + 1


def test_pushing_again_changes_nothing(store, make_model):
    model_dir = make_model()
    first = store.push(model_dir, ["champion"])
    before = _tree(store.root)
    assert store.push(model_dir) == first
    assert _tree(store.root) == before


def test_version_never_gets_other_content(store, make_model):
    first = store.push(make_model())
    with pytest.raises(RegistryError, match="v1 is in the registry already, with other content"):
        store.push(make_model(weights=b"other"))
    assert store.resolve("sentiment:v1") == first.digest


def test_version_tag_never_moves(store, make_model):
    first = store.push(make_model("v1"))
    second = store.push(make_model("v2"))
    with pytest.raises(RegistryError, match="never moves"):
        store.tag("sentiment", second.digest, "v1")
    with pytest.raises(RegistryError, match="belongs to the model of that version"):
        store.push(make_model("v3"), ["v1"])
    assert store.tags("sentiment") == {"v1": first.digest, "v2": second.digest}


def test_tag_moves_to_the_newer_model(store, make_model):
    first = store.push(make_model("v1"), ["champion"])
    second = store.push(make_model("v2"), ["candidate"])
    store.tag("sentiment", second.digest, "champion")
    assert store.tags("sentiment") == {
        "v1": first.digest,
        "v2": second.digest,
        "candidate": second.digest,
        "champion": second.digest,
    }
    assert store.resolve("sentiment") == second.digest
    assert store.resolve(f"sentiment@{first.digest}") == first.digest


def test_next_version_follows_the_highest(store, make_model):
    assert store.next_version("sentiment") == "v1"
    store.push(make_model("v9"))
    store.push(make_model("v10"))
    assert store.next_version("sentiment") == "v11"
    assert [model.version for model in store.list("sentiment")] == ["v10", "v9"]
    assert store.names() == ["sentiment"]


def test_unsigned_or_incomplete_directory_is_not_pushed(store, make_model, tmp_path):
    with pytest.raises(ArtifactInvalid, match=r"model\.sig missing"):
        store.push(make_model(signed=False))
    with pytest.raises(ArtifactInvalid, match="no directory"):
        store.push(tmp_path / "nowhere")
    assert not store.root.exists()


@pytest.mark.parametrize(
    "reference",
    ["", "../x", "a/b", "A", "x:../y", "x@sha256:1", "x@" + "sha256:" + "F" * 64, "x\n", "x:y\n", "-x"],
)
def test_reference_that_could_leave_the_store_is_refused(store, reference):
    with pytest.raises(RegistryError, match=r"cannot be|is not a digest"):
        store.resolve(reference)


def test_what_is_not_here_is_named_with_what_is(store, make_model, tmp_path):
    with pytest.raises(ModelNotFound, match="Names here: none"):
        store.resolve("sentiment:champion")
    store.push(make_model())
    with pytest.raises(ModelNotFound, match="it has: v1"):
        store.resolve("sentiment:champion")
    unknown = "sha256:" + "0" * 64
    with pytest.raises(ModelNotFound, match="has no model"):
        store.resolve(f"sentiment@{unknown}")
    with pytest.raises(ModelNotFound, match="has no blob"):
        store.checkout("sentiment", unknown, tmp_path / "out")
    with pytest.raises(ModelNotFound):
        store.tag("sentiment", unknown, "champion")
    assert not (tmp_path / "out").exists()


def test_checkout_does_not_overwrite(store, make_model, tmp_path):
    pushed = store.push(make_model())
    (tmp_path / "out").mkdir()
    with pytest.raises(RegistryError, match="exists already"):
        store.checkout("sentiment", pushed.digest, tmp_path / "out")


def test_pushing_again_mends_a_damaged_blob(store, make_model, tmp_path):
    model_dir = make_model()
    pushed = store.push(model_dir)
    weights = json.loads(store.manifest_bytes("sentiment", pushed.digest))["layers"][0]
    store.blob_path("sentiment", weights["digest"]).write_bytes(b"rot")
    with pytest.raises(ArtifactInvalid, match="is damaged"):
        store.checkout("sentiment", pushed.digest, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    store.push(model_dir)
    store.checkout("sentiment", pushed.digest, tmp_path / "out")


def test_entries_of_other_clients_in_the_index_are_kept_and_not_listed(store, make_model):
    store.push(make_model("v1"))
    path = store.root / "sentiment/index.json"
    index = json.loads(path.read_text())
    foreign = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": "application/vnd.other",
        "digest": "sha256:" + "1" * 64,
        "size": 3,
    }
    path.write_text(json.dumps(index | {"manifests": [foreign, *index["manifests"]]}))
    store.push(make_model("v2"))
    assert foreign in json.loads(path.read_text())["manifests"]
    assert [model.version for model in store.list("sentiment")] == ["v2", "v1"]


def test_layout_written_by_another_client_is_read(store, make_model):
    """skopeo copy oci:… oci:… writes an index without media type and artifact types."""
    pushed = store.push(make_model("v1"), ["champion"])
    path = store.root / "sentiment/index.json"
    index = json.loads(path.read_text())
    for entry in index["manifests"]:
        del entry["artifactType"]
    path.write_text(json.dumps({"schemaVersion": 2, "manifests": index["manifests"]}))
    assert store.list("sentiment") == [pushed]


def test_full_disk_leaves_what_was_there(store, make_model, monkeypatch):
    first = store.push(make_model("v1"), ["champion"])

    def no_room(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(RegistryError, match="No space left on device"):
        store.push(make_model("v2"), ["champion"])
    monkeypatch.undo()
    assert store.tags("sentiment") == {"v1": first.digest, "champion": first.digest}
    assert not list((store.root / "sentiment").glob(".unfinished-*"))


def test_place_that_cannot_be_written_is_named(tmp_path, make_model):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(RegistryError, match=f"The registry {tmp_path}/file/registry cannot be written"):
        Store(tmp_path / "file/registry").push(make_model())


PUSHER = textwrap.dedent("""
    import sys
    from pathlib import Path
    from millpond.registry import Store
    store = Store(Path(sys.argv[1]))
    for model_dir in sys.argv[2:]:
        model = store.push(Path(model_dir), ["candidate"])
        for i in range(5):
            store.tag("sentiment", model.digest, f"{model.version}-tag{i}")
""")


def test_pushes_and_tags_of_two_processes_all_arrive(store, make_model):
    directories = [str(make_model(f"v{n}")) for n in range(1, 9)]
    processes = [
        subprocess.Popen([sys.executable, "-c", PUSHER, str(store.root), *directories[half::2]]) for half in (0, 1)
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    tags = store.tags("sentiment")
    assert len(tags) == 8 + 8 * 5 + 1
    assert all(tags[f"v{n}-tag{i}"] == tags[f"v{n}"] for n in range(1, 9) for i in range(5))
    assert len(store.list("sentiment")) == 8


def test_locked_name_is_waited_for_only_so_long(store, make_model, monkeypatch):
    monkeypatch.setattr("millpond.registry.store.LOCK_WAIT_S", 0.05)
    with store._locked("sentiment"), pytest.raises(RegistryError, match="Another process"):
        store.push(make_model())


def _blob(layout: Path, digest: str) -> bytes:
    return (layout / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes()


def _tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_messages_survive_a_round_trip(store, make_model):
    pushed = store.push(make_model())
    assert msgspec.json.decode(msgspec.json.encode(pushed), type=type(pushed)) == pushed
