import subprocess
import sys
from pathlib import Path

import pytest

from millpond.files import lock, replace, sync


def test_a_file_is_replaced_whole_and_its_directory_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    replace(path, b"old")
    replace(path, b"new", durable=False)
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_the_old_content_outlives_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace(path, b"old")

    def full(path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("millpond.files.sync", full)
    with pytest.raises(OSError, match="no space left"):
        replace(path, b"new")
    assert path.read_bytes() == b"old"


def test_content_and_names_can_be_synced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    sync(tmp_path / "file")
    sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "none")


def test_one_process_at_a_time_has_a_lock_and_its_end_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from millpond.files import lock\n"
            "file = Path(sys.argv[1]).open('w'); lock(file, 0); print('held', flush=True); time.sleep(60)",
            str(path),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with path.open("w") as file:
            with pytest.raises(BlockingIOError):
                lock(file, wait_s=0.05)
            holder.kill()
            lock(file, wait_s=10)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
