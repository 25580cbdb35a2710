"""Downloads against a real HTTP server that cuts connections, ignores ranges, or sends the wrong file."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from millpond.learn.download import DownloadError, download

CONTENT = random.Random(0).randbytes(1_500_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Site:
    """What the server does, and what it was asked for."""

    content: bytes = CONTENT
    cut_after: int | None = None
    """Bytes of each answer after which the connection is closed."""
    ranges: bool = True
    statuses: list[int] = field(default_factory=list)
    """Errors to answer with, one a request, before anything else."""
    asked: list[str | None] = field(default_factory=list)
    wrong_range: bool = False
    url: str = ""


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up early is part of the tests."""


@pytest.fixture
def site() -> Iterator[Site]:
    here = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            here.asked.append(self.headers["Range"])
            if here.statuses:
                self.send_error(here.statuses.pop(0))
                return
            start = 0
            if here.ranges and self.headers["Range"]:
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                if start >= len(here.content):
                    self.send_error(416)
                    return
                self.send_response(206)
                shown = 0 if here.wrong_range else start
                self.send_header("Content-Range", f"bytes {shown}-{len(here.content) - 1}/{len(here.content)}")
            else:
                self.send_response(200)
            body = here.content[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: here.cut_after])

        def log_message(self, *args: object) -> None:
            pass

    server = QuietServer(("127.0.0.1", 0), Handler)
    here.url = f"http://127.0.0.1:{server.server_port}/file"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield here
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(site: Site, to: Path) -> Path:
    return download(site.url, to, size=len(CONTENT), sha256=SHA256, pause_s=0.001)


def test_a_file_is_fetched_once(site: Site, tmp_path: Path) -> None:
    to = fetch(site, tmp_path / "deep" / "file")
    assert to.read_bytes() == CONTENT
    fetch(site, to)
    assert site.asked == [None]


def test_a_cut_connection_is_resumed_where_it_was_cut(site: Site, tmp_path: Path) -> None:
    site.cut_after = 400_000
    counts: list[int] = []
    download(site.url, tmp_path / "file", size=len(CONTENT), sha256=SHA256, pause_s=0.001, on_bytes=counts.append)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert site.asked == [None, "bytes=400000-", "bytes=800000-", "bytes=1200000-"]
    assert counts == sorted(counts)
    assert counts[-1] == len(CONTENT)


def test_what_another_run_left_is_resumed(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1_000_000])
    fetch(site, tmp_path / "file")
    assert site.asked == ["bytes=1000000-"]


def test_a_server_without_ranges_sends_it_all_again(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    (tmp_path / "file.part").write_bytes(b"x" * 1_000_000)
    assert fetch(site, tmp_path / "file").read_bytes() == CONTENT


def test_a_server_that_is_busy_is_asked_again(site: Site, tmp_path: Path) -> None:
    site.statuses = [503]
    (tmp_path / "file.part").write_bytes(CONTENT[:10])
    assert fetch(site, tmp_path / "file").read_bytes() == CONTENT


def test_another_content_is_refused_and_deleted(site: Site, tmp_path: Path) -> None:
    site.content = CONTENT[:-1] + b"?"
    with pytest.raises(DownloadError, match="another content than expected"):
        fetch(site, tmp_path / "file")
    assert not list(tmp_path.glob("file*"))


def test_a_damaged_beginning_is_found_by_the_hash(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    with pytest.raises(DownloadError, match="another content"):
        fetch(site, tmp_path / "file")
    assert fetch(site, tmp_path / "file").read_bytes() == CONTENT


def test_a_longer_file_is_cut_off_and_refused(site: Site, tmp_path: Path) -> None:
    site.content = CONTENT * 3
    with pytest.raises(DownloadError, match="more than the"):
        fetch(site, tmp_path / "file")
    assert (tmp_path / "file.part").stat().st_size <= len(CONTENT)


def test_a_server_that_sends_another_part_is_not_believed(site: Site, tmp_path: Path) -> None:
    site.wrong_range = True
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    with pytest.raises(DownloadError, match="another part of the file"):
        fetch(site, tmp_path / "file")
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("status", [404, 403])
def test_a_refusal_ends_it_at_once(site: Site, tmp_path: Path, status: int) -> None:
    site.statuses = [status] * 9
    with pytest.raises(DownloadError, match=f"answers {status}"):
        fetch(site, tmp_path / "file")
    assert len(site.asked) == 1


def test_no_server_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="cannot be fetched"):
        download("http://127.0.0.1:9/file", tmp_path / "file", size=10, sha256=SHA256)
