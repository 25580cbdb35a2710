"""The state file: written whole, shared by threads, and no trouble of its own on a full disk."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from millpond.edge import state as state_module
from millpond.edge.state import EdgeFiles, Refusal, StateFile, edge_name, read_state
from millpond.schema import RefusedModel
from millpond.settings import EdgeSettings


def refusal(number: int, code: str = "golden") -> Refusal:
    model = RefusedModel(digest=f"sha256:{number}", version=f"v{number}", reason="why", at="2026-01-02T03:04:05Z")
    return Refusal(code=code, model=model)


def test_what_was_noted_is_read_again(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "sync.json")
    file.attempted("models", "the hub is away")
    file.refuse(refusal(1))
    state = read_state(tmp_path / "sync.json")
    assert state.errors == {"models": "the hub is away"}
    assert state.last_contact is None
    assert state.refused == {"golden": 1}
    again = StateFile(tmp_path / "sync.json")
    again.attempted("models", None)
    assert again.state.errors == {}
    assert again.state.last_contact is not None
    assert again.state.refusal("sha256:1") is not None
    assert again.state.refusal("sha256:2") is None
    assert again.state.refusal(None) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"errors": 5}'])
def test_a_damaged_file_is_nothing_known(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "sync.json"
    path.write_bytes(content)
    assert read_state(path).champion is None
    StateFile(path).update(champion="sha256:1")
    assert read_state(path).champion == "sha256:1"


def test_refusals_are_bounded_and_their_counts_go_on(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "sync.json")
    for number in range(50):
        file.refuse(refusal(number))
    file.refuse(refusal(49, "signature"))
    assert len(file.state.refusals) == state_module.KEEP_REFUSALS
    assert file.state.refused == {"golden": 50, "signature": 1}
    assert file.state.refusals[-1].code == "signature"


def test_a_write_that_fails_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StateFile(tmp_path / "sync.json")
    replace = state_module.replace

    def full(path: Path, content: bytes, *, durable: bool = True) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(state_module, "replace", full)
    file.update(champion="sha256:1")
    assert file.state.champion == "sha256:1"
    monkeypatch.setattr(state_module, "replace", replace)
    file.update(champion="sha256:1")
    assert read_state(tmp_path / "sync.json").champion == "sha256:1"


def test_threads_do_not_overwrite_each_other(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "sync.json")
    threads = [
        threading.Thread(target=lambda name=name: [file.attempted(name, str(count)) for count in range(50)])
        for name in ("models", "corrections")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_state(tmp_path / "sync.json").errors == {"models": "49", "corrections": "49"}


@pytest.mark.parametrize(
    ("given", "name"), [("berlin-1", "berlin-1"), ("mühle am bach", "m-hle-am-bach"), ("-.x", "x"), ("---", "edge")]
)
def test_a_name_is_made_one_that_the_hub_takes(given: str, name: str) -> None:
    assert edge_name(EdgeSettings(name=given)) == name


def test_a_home_is_owned_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "OWNED_S", 0.0)
    files, same = EdgeFiles(tmp_path), EdgeFiles(tmp_path)
    assert not files.is_running()
    with files.owned():
        assert same.is_running()
        with pytest.raises(state_module.EdgeBusy, match="Another edge"), same.owned():
            pass
    with same.owned():
        pass
