"""Fetch a file of known size and hash over HTTP: resumed where it was cut, checked before it has its name."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from millpond.learn.datasets import DataError

ATTEMPTS = 6
"""Attempts in a row that may fail without a new byte."""
CONNECT_S = 10.0
READ_S = 30.0

OnBytes = Callable[[int], None]
"""Told how many bytes of the file are here."""


class DownloadError(DataError):
    """A file could not be fetched; what came so far is kept, so that trying again goes on from there."""


def download(
    url: str, to: Path, *, size: int, sha256: str, on_bytes: OnBytes = lambda count: None, pause_s: float = 1.0
) -> Path:
    """Fetch `url` into `to`; does nothing if the right file is there already.

    Raises:
        DownloadError: the server cannot be reached, answers with an error, or sends something else.
    """
    if to.is_file() and to.stat().st_size == size and _sha256(to) == sha256:
        on_bytes(size)
        return to
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_name(to.name + ".part")
    failures = 0
    with httpx.Client(follow_redirects=True, timeout=httpx.Timeout(READ_S, connect=CONNECT_S)) as client:
        while (have := part.stat().st_size if part.exists() else 0) < size:
            try:
                _continue(client, url, part, have, size, on_bytes)
                reason = "the connection was cut"
            except httpx.HTTPStatusError as error:
                code = error.response.status_code
                if code < 500 and code != 429:
                    raise DownloadError(f"{url} cannot be fetched: the server answers {code}.") from error
                reason = f"the server answers {code}"
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
            now = part.stat().st_size if part.exists() else 0
            failures = 0 if now > have else failures + 1
            if failures >= ATTEMPTS or (failures and not now):
                raise DownloadError(
                    f"{url} cannot be fetched: {reason}. {now:,} of {size:,} bytes are here and kept; "
                    "the same command goes on from there."
                )
            if now < size:
                time.sleep(pause_s * failures)
    found = _sha256(part)
    if part.stat().st_size != size or found != sha256:
        part.unlink()
        raise DownloadError(
            f"{url} sent a file with another content than expected (sha256 {found[:16]}…, not {sha256[:16]}…). It was "
            "deleted. Something on the way changes it, or the publisher has: do not use it before you know which."
        )
    part.rename(to)
    return to


def _continue(client: httpx.Client, url: str, part: Path, have: int, size: int, on_bytes: OnBytes) -> None:
    """Append what comes to `part`; start it anew where the server does not know ranges."""
    # identity: a compressed answer would have another length and could not be resumed.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == 416:  # what we have is not a beginning of what they have
            part.unlink()
            return
        response.raise_for_status()
        resumed = response.status_code == 206
        if resumed:
            start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if start is None or int(start[1]) != have:
                raise httpx.RemoteProtocolError("the server sent another part of the file than asked for")
        count = have if resumed else 0
        with part.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_raw():
                file.write(chunk[: size - count])
                count += len(chunk)
                on_bytes(min(count, size))
                if count > size:
                    file.truncate(0)
                    raise DownloadError(f"{url} sends more than the {size:,} bytes expected; it is another file.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
