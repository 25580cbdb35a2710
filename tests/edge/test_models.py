"""The shelf: what is current, what stays, what goes, going back."""

from __future__ import annotations

from pathlib import Path

import pytest

from millpond.edge.models import ModelShelf, RollbackImpossible
from millpond.registry import ModelNotFound

DIGESTS = [f"sha256:{digit * 64}" for digit in "123456"]


@pytest.fixture
def shelf(tmp_path: Path) -> ModelShelf:
    return ModelShelf(tmp_path / "models")


def place(shelf: ModelShelf, digest: str, keep: int = 3) -> None:
    version = DIGESTS.index(digest) + 1
    config = f'{{"name": "sentiment", "version": "v{version}", "labels": ["a", "b"], "architecture": "ngram"}}'
    (shelf.incoming(digest) / "config.json").write_text(config)
    shelf.add(digest, b"")
    shelf.activate(digest, keep)


def serving(shelf: ModelShelf) -> str | None:
    current = shelf.current()
    return current.serving if current else None


def test_before_the_first_model_there_is_none(shelf: ModelShelf) -> None:
    assert shelf.current() is None
    assert shelf.previous() == []
    with pytest.raises(RollbackImpossible, match="no earlier version"):
        shelf.roll_back()


def test_only_the_last_versions_stay_on_disk(shelf: ModelShelf) -> None:
    for digest in DIGESTS:
        place(shelf, digest, keep=3)
    assert serving(shelf) == DIGESTS[-1]
    assert [ref.version for ref in shelf.previous()] == ["v5", "v4"]
    assert [shelf.has(digest) for digest in DIGESTS] == [False, False, False, True, True, True]
    assert list((shelf.root / "incoming").iterdir()) == []


def test_one_version_alone_can_be_kept(shelf: ModelShelf) -> None:
    for digest in DIGESTS[:2]:
        place(shelf, digest, keep=1)
    assert serving(shelf) == DIGESTS[1]
    assert shelf.previous() == []
    assert not shelf.has(DIGESTS[0])


def test_rolling_back_goes_back_step_by_step_and_pins_the_champion(shelf: ModelShelf) -> None:
    for digest in DIGESTS[:3]:
        place(shelf, digest)
    assert shelf.roll_back().version == "v2"
    assert shelf.roll_back().version == "v1"
    current = shelf.current()
    assert current is not None
    assert (current.serving, current.pinned) == (DIGESTS[0], DIGESTS[2])
    with pytest.raises(RollbackImpossible):
        shelf.roll_back()
    assert serving(shelf) == DIGESTS[0]


def test_a_new_model_ends_the_pin(shelf: ModelShelf) -> None:
    for digest in DIGESTS[:2]:
        place(shelf, digest)
    shelf.roll_back()
    place(shelf, DIGESTS[2])
    current = shelf.current()
    assert current is not None
    assert (current.history, current.pinned) == ([DIGESTS[0], DIGESTS[2]], None)
    assert not shelf.has(DIGESTS[1])


def test_a_model_that_comes_back_is_not_listed_twice(shelf: ModelShelf) -> None:
    for digest in DIGESTS[:2]:
        place(shelf, digest)
    shelf.activate(DIGESTS[0], keep=3)
    current = shelf.current()
    assert current is not None
    assert current.history == [DIGESTS[1], DIGESTS[0]]


def test_a_discarded_model_gives_way_to_the_one_before(shelf: ModelShelf) -> None:
    for digest in DIGESTS[:2]:
        place(shelf, digest)
    shelf.discard(DIGESTS[1])
    assert serving(shelf) == DIGESTS[0]
    shelf.discard(DIGESTS[0])
    assert serving(shelf) is None
    assert not shelf.has(DIGESTS[0])


@pytest.mark.parametrize("content", [b"", b"{", b'{"history": []}', b'{"history": 5}', b"\xff"])
def test_a_damaged_pointer_is_no_model_until_it_is_written_anew(shelf: ModelShelf, content: bytes) -> None:
    place(shelf, DIGESTS[0])
    shelf.pointer.write_bytes(content)
    assert shelf.current() is None
    shelf.activate(DIGESTS[0], keep=3)
    assert serving(shelf) == DIGESTS[0]


def test_a_model_that_is_not_here_is_told_so(shelf: ModelShelf) -> None:
    with pytest.raises(ModelNotFound, match="not on this edge"):
        shelf.describe(DIGESTS[0])
    assert not shelf.is_whole(DIGESTS[0])


def test_what_was_begun_is_cleared_but_for_the_one_that_goes_on(shelf: ModelShelf) -> None:
    for digest in DIGESTS[:2]:
        (shelf.incoming(digest) / "model.onnx.part").write_text("half")
    shelf.clear_incoming(keep=DIGESTS[1])
    assert [path.name for path in (shelf.root / "incoming").iterdir()] == ["2" * 64]
    assert (shelf.incoming(DIGESTS[1]) / "model.onnx.part").exists()
