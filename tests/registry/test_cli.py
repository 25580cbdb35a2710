import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from millpond.registry import Store


@pytest.fixture
def millpond(tmp_path, keys):
    """Return a function that runs the real command against a registry of its own."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")} | {
            "MILLPOND_HOME": str(tmp_path / "home"),
            "MILLPOND_REGISTRY_PUBLIC_KEY": str(keys[1]),
            "COLUMNS": "200",
        }
        command = [sys.executable, "-m", "millpond", "registry", *arguments]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home/registry")


def test_list_shows_models_and_tags(millpond, store, make_model):
    assert "No models" in millpond("list").stdout
    pushed = store.push(make_model("v1"), ["champion"])
    shown = millpond("list").stdout
    assert "sentiment" in shown
    assert "champion" in shown
    assert "90.00%" in shown
    assert json.loads(millpond("list", "--json").stdout)[0]["digest"] == pushed.digest


def test_show_gives_config_and_files(millpond, store, make_model):
    pushed = store.push(make_model("v1"))
    shown = json.loads(millpond("show", "sentiment:v1", "--json").stdout)
    assert shown["model"]["digest"] == pushed.digest
    assert shown["config"]["labels"] == ["negative", "positive"]
    assert set(shown["files"]) == {path.name for path in make_model("v1").iterdir()}
    assert "weights.safetensors" in millpond("show", f"sentiment@{pushed.digest}").stdout


def test_verify_accepts_the_signed_and_refuses_the_damaged(millpond, store, make_model):
    pushed = store.push(make_model("v1"), ["champion"])
    done = millpond("verify", "sentiment")
    assert done.returncode == 0, done.stderr
    assert "is whole" in done.stdout
    assert json.loads(millpond("verify", "sentiment", "--json").stdout)["verified"] is True
    weights = json.loads(store.manifest_bytes("sentiment", pushed.digest))["layers"][0]["digest"]
    store.blob_path("sentiment", weights).write_bytes(b"w" * 999 + b"x")
    refused = millpond("verify", "sentiment")
    assert refused.returncode == 2
    assert "is damaged" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_tag_moves(millpond, store, make_model):
    store.push(make_model("v1"), ["champion"])
    second = store.push(make_model("v2"))
    done = millpond("tag", "sentiment:v2", "champion")
    assert done.returncode == 0, done.stderr
    assert store.resolve("sentiment") == second.digest


def test_keygen_writes_a_pair_once(millpond, tmp_path):
    private, public = tmp_path / "k/a.key", tmp_path / "k/a.pub"
    arguments = ("keygen", "--private-key", str(private), "--public-key", str(public))
    done = millpond(*arguments, "--json")
    assert json.loads(done.stdout) == {"private_key": str(private), "public_key": str(public)}
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    again = millpond(*arguments)
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize(
    "arguments",
    [("show", "../x"), ("show", "nothing"), ("list", "nothing"), ("tag", "nothing:v1", "champion"), ("verify", "a@b")],
)
def test_mistake_gets_one_message_and_exit_2(millpond, arguments):
    done = millpond(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_model_nobody_tagged_champion_is_found_by_version(millpond, store, make_model):
    store.push(make_model("v1"))
    refused = millpond("show", "sentiment")
    assert "it has: v1" in refused.stderr
    assert Path(store.root).exists()
