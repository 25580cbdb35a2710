"""The engine answers as the model does, however texts are batched; golden answers tell a wrong model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_site import LABELS, score, write_model
from millpond.edge import engine as engine_module
from millpond.edge.engine import Engine, LiveEngine, ModelUnfit
from millpond.edge.models import ModelShelf

DIGEST = "sha256:" + "0" * 64
TEXTS = ["good film", "bad film", "", "x", "good " * 500, "Bad, bad; good.", "the", "\x00", "\ud800 good"]


def load(directory: Path) -> Engine:
    return Engine(directory, DIGEST, threads=1)


def test_scores_are_the_models_probabilities_in_the_order_of_the_texts(tmp_path: Path) -> None:
    engine = load(write_model(tmp_path / "model", lean=0.25))
    scores = engine.scores(TEXTS)
    assert scores.shape == (len(TEXTS), 2)
    np.testing.assert_allclose(scores[:, 1], [score(text, 0.25) for text in TEXTS], atol=1e-6)
    np.testing.assert_allclose(scores.sum(axis=1), 1)
    assert (engine.ref.name, engine.ref.version, engine.labels) == ("sentiment", "v1", LABELS)


def test_a_long_text_among_short_ones_does_not_blow_the_batch_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(write_model(tmp_path / "model"))
    texts = ["good film", "bad " * 400, *["bad"] * 300, "good " * 90]
    whole = engine.scores(texts)
    sizes = []
    run = engine._session.run

    class Watched:
        def run(self, outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            sizes.append(feeds["ids"].size)
            return run(outputs, feeds)

    monkeypatch.setattr(engine_module, "RUN_FLOATS", 100 * engine.config.floats_per_id)
    monkeypatch.setattr(engine, "_session", Watched())
    np.testing.assert_allclose(engine.scores(texts), whole)
    assert sorted(sizes)[-1] == 400  # alone
    assert sorted(sizes)[-2] <= 100


def test_golden_answers_of_the_model_itself_pass(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", lean=0.5)
    load(directory).check_golden(directory)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "golden"),
        (b"{", "golden"),
        (b'{"text": "good"}\n', "golden"),
        (b'{"text": "", "scores": {"negative": 0.50011, "positive": 0.49989}}\n', "golden"),
        (b'{"text": "", "scores": {"negative": 0.5, "neutral": 0.5}}\n', "labels"),
        (b'{"text": "", "scores": {"negative": 0.5}}\n', "labels"),
    ],
)
def test_wrong_golden_answers_are_told(tmp_path: Path, content: bytes, code: str) -> None:
    directory = write_model(tmp_path / "model")
    (directory / "golden.jsonl").write_bytes(content)
    with pytest.raises(ModelUnfit) as caught:
        load(directory).check_golden(directory)
    assert caught.value.code == code


def test_a_difference_within_the_tolerance_passes(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    (directory / "golden.jsonl").write_text('{"text": "", "scores": {"negative": 0.50009, "positive": 0.49991}}\n')
    load(directory).check_golden(directory)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("config.json", b"{}", "config"),
        ("tokenizer.json", b"{}", "config"),
        ("model.onnx", b"not a graph", "engine"),
        ("model.onnx", b"", "engine"),
    ],
)
def test_damaged_files_make_no_engine(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    directory = write_model(tmp_path / "model")
    (directory / name).write_bytes(content)
    with pytest.raises(ModelUnfit) as caught:
        load(directory)
    assert caught.value.code == code


def test_a_graph_with_another_number_of_labels_makes_no_engine(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", config_labels=["negative", "neutral", "positive"])
    with pytest.raises(ModelUnfit) as caught:
        load(directory)
    assert caught.value.code == "labels"


def place(shelf: ModelShelf, digest: str, lean: float) -> None:
    incoming = shelf.incoming(digest)
    incoming.rmdir()
    write_model(incoming, lean=lean)
    shelf.add(digest, b"")
    shelf.activate(digest, keep=3)


def test_the_live_engine_follows_what_is_current_and_keeps_the_old_one_when_that_fails(tmp_path: Path) -> None:
    shelf = ModelShelf(tmp_path)
    live = LiveEngine(shelf, threads=1)
    live.close()
    assert live.engine is None
    first, second = (f"sha256:{digit * 64}" for digit in "12")
    place(shelf, first, 0.0)
    live.follow()
    assert live.engine is not None
    assert live.engine.ref.digest == first
    place(shelf, second, 1.0)
    (shelf.path(second) / "model.onnx").write_bytes(b"damaged on the disk")
    live.follow()
    assert live.engine.ref.digest == first
    shelf.discard(second)
    live.follow()
    assert live.engine.ref.digest == first


def test_at_a_start_with_a_damaged_model_the_version_before_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = ModelShelf(tmp_path)
    first, second = (f"sha256:{digit * 64}" for digit in "12")
    place(shelf, first, 0.0)
    place(shelf, second, 1.0)
    graph = shelf.path(second) / "model.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(b"damaged on the disk")
    live = LiveEngine(shelf, threads=1)
    live.close()
    assert live.engine is not None
    assert live.engine.ref.digest == first
    graph.write_bytes(whole)
    live.follow()
    assert live.engine.ref.digest == first  # not tried again at every look
    monkeypatch.setattr(engine_module, "LOAD_AGAIN_S", 0.0)
    live.follow()
    assert live.engine.ref.digest == second
