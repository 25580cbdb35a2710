"""A model directory with all its files, a key pair, and the same directory signed; none of it needs torch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from millpond.registry import DataSource, Lineage, ModelConfig, generate_key_pair, sign

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return paths of a private and a public key."""
    directory = tmp_path_factory.mktemp("keys")
    generate_key_pair(directory / "signing.key", directory / "signing.pub")
    return directory / "signing.key", directory / "signing.pub"


@pytest.fixture
def make_model(tmp_path: Path, keys: tuple[Path, Path]) -> MakeModel:
    """Return a function that writes a model directory, signed unless told otherwise."""

    def make(
        version: str = "v1", *, name: str = "sentiment", signed: bool = True, weights: bytes = b"w" * 1000
    ) -> Path:
        directory = tmp_path / f"{name}-{version}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        config = ModelConfig(
            name=name,
            version=version,
            labels=["negative", "positive"],
            architecture="ngram",
            options={"buckets": 1024},
            metrics={"test_accuracy": 0.9},
            data=[DataSource(name="imdb", digest="sha256:" + "0" * 64, rows=25_000, role="train")],
            lineage=Lineage(seed=7),
            code_version="0.1.0",
            created="2026-01-02T03:04:05Z",
        )
        (directory / "config.json").write_bytes(msgspec.json.encode(config))
        (directory / "weights.safetensors").write_bytes(weights)
        (directory / "model.onnx").write_bytes(b"onnx " + version.encode())
        (directory / "tokenizer.json").write_text("{}")
        (directory / "golden.jsonl").write_text('{"text": "", "scores": {"negative": 0.5, "positive": 0.5}}\n')
        if signed:
            sign(directory, keys[0])
        return directory

    return make
