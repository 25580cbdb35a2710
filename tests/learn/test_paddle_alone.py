"""`millpond[paddle]` in an environment of its own, without torch: it trains for ours, and exports to ONNX by itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch

from millpond.learn.datasets import Dataset
from millpond.learn.paddle.place import Place
from millpond.learn.train import predict

from .test_paddle import CPU, SMALL, fresh, train_small

ROOT = Path(__file__).parents[2]
SOURCES = ("src", "pyproject.toml", "README.md", "LICENSE")
PAGE = ROOT / "docs/how-to/train-with-paddle.md"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of a new environment with `millpond[paddle]` alone, built as a wheel."""
    directory = tmp_path_factory.mktemp("alone")
    for name in SOURCES:  # a copy: building leaves files beside the sources
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, directory / name)
    subprocess.run([sys.executable, "-m", "venv", directory / "venv"], check=True)
    made = directory / "venv/bin/python"
    pip(made, "-c", str(ROOT / "constraints.txt"), f"{directory}[paddle]").check_returncode()
    return made


def pip(python: Path, *wanted: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [str(python), "-m", "pip", "install", "-q", *wanted]
    return subprocess.run(command, env=environ, check=False, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_another_python_trains_and_has_no_torch(python: Path, small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    find = "import importlib.util, sys; print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    found = subprocess.run([python, "-c", find, "torch", "onnx", "paddle"], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["paddle"]
    training = train_small(small, "seqcnn", place=Place("cpu", python))
    assert training.epochs[-1].loss < training.epochs[0].loss


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_paddles_own_export_to_onnx_answers_as_ours(
    python: Path, small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the page on Paddle says. (paddle2onnx says errors without failing: what it wrote is looked for.)"""
    page = PAGE.read_text()
    (script,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    (wanted,) = re.findall(r"pip install 'millpond\[paddle\]' (.+)", page)
    if (installed := pip(python, *wanted.split())).returncode:
        pytest.skip(f"paddle2onnx cannot be had: {installed.stderr.strip().splitlines()[-1]}")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    models = {}
    for architecture in SMALL:
        models[architecture], data, _ = fresh(small, architecture)
        with torch.no_grad():
            for parameter in models[architecture].parameters():
                parameter.mul_(2)  # scores far from 1/2
        place = tmp_path / architecture
        place.mkdir()
        safetensors.torch.save_file(models[architecture].weights(), place / "weights.safetensors")
        command = [python, "-W", "ignore", "-c", script.replace("seqcnn", architecture), "weights.safetensors"]
        done = subprocess.run(command, cwd=place, check=False, capture_output=True, text=True, timeout=300)
        assert (place / "by_paddle.onnx").exists(), done.stdout + done.stderr
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it leaves constants that nothing uses
    for architecture, model in models.items():
        path = tmp_path / architecture / "by_paddle.onnx"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for count in (1, 40):
            texts = data.take(np.arange(count))
            (logits,) = session.run(None, {"ids": texts.padded().astype(np.int64)})
            expected = predict(model, texts, CPU)
            assert torch.from_numpy(logits).softmax(1).numpy() == pytest.approx(expected, abs=1e-4)
        assert np.ptp(expected, 0).min() > 0.05
