"""The edge's view of the hub: the pull API of OCI distribution, corrections, reports. Bytes that arrive are hostile.

Nothing follows redirects (the token would go along); every wait has a limit; nothing is read past its limit.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec

from millpond import MillpondError, __version__
from millpond.registry.manifest import MANIFEST_TYPE, MAX_MANIFEST_BYTES, Descriptor
from millpond.schema import CorrectionBatch, CorrectionReceipt, EdgeReport, EdgeReportReceipt

T = TypeVar("T")

TIMEOUT = httpx.Timeout(30.0, connect=5.0)
MAX_ANSWER_BYTES = 1024 * 1024
DOWNLOAD_S = 3600.0
"""Longest download of one file; what has arrived is kept for the next attempt."""


class HubUnreachable(MillpondError):
    """The hub does not answer, or not as a hub does: try again later."""


class HubRefused(MillpondError):
    """The hub answered that it will not do this; the same request will not fare better."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class BlobDamaged(MillpondError):
    """What arrived does not have the digest or the size that the manifest names."""


class HubClient:
    """One connection pool to one hub."""

    def __init__(self, url: str, token: str) -> None:
        headers = {"User-Agent": f"millpond-edge/{__version__}", "Accept-Encoding": "identity"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self._url = url
        self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT, follow_redirects=False)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def manifest(self, name: str, tag: str, etag: str | None) -> tuple[bytes, str | None] | None:
        """Return a tag's manifest and its ETag; None if it is still the one with `etag`.

        Raises:
            HubUnreachable, HubRefused: no manifest could be had.
        """
        headers = {"Accept": MANIFEST_TYPE} | ({"If-None-Match": etag} if etag else {})
        with self._answer("GET", f"/v2/{name}/manifests/{tag}", headers=headers) as response:
            if response.status_code == httpx.codes.NOT_MODIFIED:
                return None
            return self._body(response, MAX_MANIFEST_BYTES), response.headers.get("ETag")

    def download(self, name: str, blob: Descriptor, to: Path) -> None:
        """Fetch a blob into the file `to`; an interrupted download goes on where it ended.

        Raises:
            BlobDamaged: the bytes are not those that the descriptor names; they are gone from the disk.
            HubUnreachable, HubRefused: the blob could not be had.
        """
        if to.exists():  # renamed only after its digest was right
            return
        part = to.with_name(f"{to.name}.part")
        part.touch()
        have = part.stat().st_size
        if have > blob.size:
            os.truncate(part, 0)
            have = 0
        if have < blob.size:
            self._fetch(name, blob, part, have)
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        size = part.stat().st_size
        if size != blob.size or f"sha256:{digest}" != blob.digest:
            part.unlink()
            raise BlobDamaged(
                f"{to.name} has {size} bytes and digest sha256:{digest}; the manifest names {blob.size} bytes and "
                f"{blob.digest}."
            )
        part.rename(to)

    def send(self, batch: CorrectionBatch) -> CorrectionReceipt:
        """Send corrections; return what the hub says of each."""
        return self._post("/api/v1/corrections", batch, CorrectionReceipt)

    def report(self, report: EdgeReport) -> EdgeReportReceipt:
        """Tell the hub how this edge is."""
        return self._post("/api/v1/edges", report, EdgeReportReceipt)

    def _fetch(self, name: str, blob: Descriptor, part: Path, have: int) -> None:
        deadline = time.monotonic() + DOWNLOAD_S
        headers = {"Range": f"bytes={have}-"} if have else {}
        with self._answer("GET", f"/v2/{name}/blobs/{blob.digest}", headers=headers) as response:
            resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
            with part.open("ab" if resumed else "wb") as file:
                written = have if resumed else 0
                for chunk in response.iter_raw():  # as it arrives: what is in a buffer is lost when the line is cut
                    written += len(chunk)
                    if written > blob.size:  # no more than was announced goes to the disk
                        part.unlink()
                        raise BlobDamaged(f"The hub sends more than the {blob.size} bytes of {blob.digest}.")
                    file.write(chunk)
                    if time.monotonic() > deadline:
                        raise HubUnreachable(
                            f"{blob.digest} did not arrive within {DOWNLOAD_S:.0f} s; it goes on later."
                        )

    def _post(self, path: str, body: msgspec.Struct, kind: type[T]) -> T:
        headers = {"Content-Type": "application/json"}
        with self._answer("POST", path, headers=headers, content=msgspec.json.encode(body)) as response:
            raw = self._body(response, MAX_ANSWER_BYTES)
        try:
            return msgspec.json.decode(raw, type=kind)
        except msgspec.MsgspecError as error:
            raise HubUnreachable(
                f"What answers at {self._url} is no hub of ours: {path} says {str(error)[:200]}."
            ) from error

    @contextmanager
    def _answer(
        self, method: str, path: str, *, headers: dict[str, str], content: bytes | None = None
    ) -> Iterator[httpx.Response]:
        try:
            with self._http.stream(method, path, headers=headers, content=content) as response:
                if response.status_code >= 500 or response.status_code in (408, 425, 429):
                    raise HubUnreachable(f"The hub at {self._url} answers {path} with {response.status_code}.")
                if response.status_code not in (200, 201, 202, 206, 304):
                    said = self._body(response, MAX_ANSWER_BYTES)[:300].decode(errors="replace")
                    raise HubRefused(
                        response.status_code,
                        f"The hub at {self._url} answers {path} with {response.status_code}: {said}",
                    )
                yield response
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise HubUnreachable(
                f"The hub at {self._url} cannot be reached: {error or type(error).__name__}."
            ) from error

    def _body(self, response: httpx.Response, limit: int) -> bytes:
        body = b""
        for chunk in response.iter_raw(64 * 1024):
            body += chunk
            if len(body) > limit:
                raise HubUnreachable(f"The hub at {self._url} sends an answer of over {limit} bytes; it was not read.")
        return body
