"""`millpond[edge]` in an environment of its own, as at an edge: no torch there, and it serves a pulled model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_site import EdgeProcess, Site, StandInHub
from waiting import wait_for

ROOT = Path(__file__).parents[2]
SOURCES = ("src", "pyproject.toml", "README.md", "LICENSE")
UNWANTED = ("torch", "onnx", "sqlalchemy", "pyarrow", "matplotlib", "psutil", "pytest")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Return the Python of a new environment with nothing but `millpond[edge]`, built as a wheel."""
    directory = tmp_path_factory.mktemp("alone")
    for name in SOURCES:  # a copy: building leaves files beside the sources
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, directory / name)
    subprocess.run([sys.executable, "-m", "venv", directory / "venv"], check=True)
    python = directory / "venv/bin/python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{directory}[edge]"],
        check=True,
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        timeout=600,
    )
    return python


def _run(python, *arguments):
    return subprocess.run([python, *arguments], capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_edge_installed_alone_serves_a_model_it_pulled_and_has_no_torch(python, tmp_path):
    find = "import importlib.util, sys; print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    assert _run(python, "-c", find, *UNWANTED, "millpond", "onnxruntime").split() == ["millpond", "onnxruntime"]
    assert str(ROOT) not in _run(python, "-c", "import millpond; print(millpond.__file__)")
    (tmp_path / "site").mkdir()
    site = Site(tmp_path / "site")
    digest = site.publish("v1")
    hub = StandInHub(site.store)
    hub.start()
    edge = EdgeProcess(tmp_path / "edge", public_key=site.public_key, hub=hub.url, python=str(python))
    try:
        with edge.running():
            wait_for(lambda: edge.serving() == digest, what="the edge to serve the model")
            prediction = edge.post("/v1/predict", {"text": "a good film"}).json()
            assert prediction["label"] == "positive"
            assert prediction["model"]["digest"] == digest
            feedback = edge.post("/v1/feedback", {"id": prediction["id"], "label": "negative"})
            assert feedback.status_code == 202
            wait_for(lambda: hub.received == [(feedback.json()["id"], "negative")], what="the correction")
            assert "<title>" in edge.http.get(edge.url + "/", headers={"Accept": "text/html"}).text
            assert edge.http.get(edge.url + "/web/millpond.css").status_code == 200
            assert json.loads(edge.cli("status", "--json").stdout)
    finally:
        hub.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", ["learn", "hub", "pool"])
def test_part_that_is_not_installed_is_named_without_a_traceback(python, part):
    commands = {"learn": ["train", "--corpus", "imdb"], "hub": ["serve"], "pool": ["serve"]}
    done = subprocess.run([python, "-m", "millpond", part, *commands[part]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "not installed here" in done.stderr
    assert "Traceback" not in done.stderr
