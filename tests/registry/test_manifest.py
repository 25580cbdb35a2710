import json

import pytest

from millpond.registry import ArtifactInvalid, Descriptor, ModelConfig, parse_config, parse_manifest
from millpond.registry.manifest import FILES, LAYER_TYPES, build_manifest, is_name, is_version

CONFIG = ModelConfig(name="sentiment", version="v1", labels=["a", "b"], architecture="ngram")
BLOBS = {name: (f"sha256:{number:064x}", number) for number, name in enumerate(FILES)}


def test_built_manifest_is_parsed_to_the_same_files():
    files = parse_manifest(build_manifest(CONFIG, BLOBS)).files()
    assert {name: (descriptor.digest, descriptor.size) for name, descriptor in files.items()} == BLOBS
    assert list(files) == list(FILES)
    assert all(isinstance(descriptor, Descriptor) for descriptor in files.values())


def test_same_input_gives_the_same_bytes():
    assert build_manifest(CONFIG, BLOBS) == build_manifest(CONFIG, dict(reversed(BLOBS.items())))


def test_fields_of_a_newer_registry_are_ignored():
    document = json.loads(build_manifest(CONFIG, BLOBS)) | {"subject": None, "future": {"a": [1]}}
    document["layers"][0]["urls"] = ["https://example.org"]
    assert parse_manifest(json.dumps(document).encode()).files().keys() == set(FILES)
    config = {"name": "sentiment", "version": "v1", "labels": ["a", "b"], "architecture": "new", "future": 1}
    assert parse_config(json.dumps(config).encode()).architecture == "new"


def test_every_layer_has_its_own_media_type():
    assert len(set(LAYER_TYPES.values())) == len(LAYER_TYPES)


@pytest.mark.parametrize(
    ("name", "valid"),
    [("a", True), ("a-b.c_d__e", True), ("a--b", True), ("a..b", False), ("-a", False), ("a/b", False)],
)
def test_names_are_those_of_the_distribution_specification(name, valid):
    assert is_name(name) is valid


def test_versions_count_from_one():
    assert is_version("v1")
    assert not any(is_version(tag) for tag in ("v0", "v01", "1", "v1.2", "v", "champion", "v1\n"))


def test_error_names_the_field():
    with pytest.raises(ArtifactInvalid, match=r"labels"):
        parse_config(b'{"name": "x", "version": "v1", "architecture": "y", "labels": 5}')
