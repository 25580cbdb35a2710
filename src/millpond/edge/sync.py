"""The process beside the web workers: newer models in, corrections and reports out.

Two threads, so that a long download never holds corrections up. Each step may fail; the next attempt comes after
a pause that grows. What is on disk alone decides where to go on, so this process may be killed at any moment.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import random
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable

from millpond import MillpondError, __version__
from millpond.edge.engine import Engine, ModelUnfit
from millpond.edge.hub_client import BlobDamaged, HubClient, HubRefused, HubUnreachable
from millpond.edge.models import ModelShelf
from millpond.edge.outbox import Outbox
from millpond.edge.predictions import PredictionLog
from millpond.edge.state import EdgeFiles, Refusal, StateFile, edge_name, utc_now
from millpond.registry import ArtifactInvalid, Manifest, RegistryError, SignatureRefused, parse_manifest, verify
from millpond.schema import MAX_BATCH, Correction, CorrectionBatch, EdgeReport, RefusedCorrection, RefusedModel
from millpond.settings import EdgeSettings

log = logging.getLogger("millpond.edge")

MAX_PAUSE_S = 30.0
"""Longest pause between attempts while the hub is away."""
REPORT_S = 15.0
"""Longest time between two reports to the hub."""
REFUSED_AGAIN_S = 3600.0
"""A refused model is tried again after this long: the fault may have been in the hub's copy, and mended."""
BATCH_BYTES = 2 * 1024 * 1024
"""JSON in one batch of corrections, so that neither memory here nor the hub's limit on requests is strained."""
SPARE_BYTES = 64 * 1024 * 1024
"""Room that a download leaves on the disk."""


class ModelSync:
    """Follow a tag at the hub: `step` makes its model current, or remembers why not."""

    def __init__(self, settings: EdgeSettings, hub: HubClient, shelf: ModelShelf, state: StateFile) -> None:
        self._settings = settings
        self._hub = hub
        self._shelf = shelf
        self._state = state
        self._etag: str | None = None
        self._manifest = b""
        self._refused_at: dict[str, float] = {}
        self._checked = False

    def step(self) -> None:
        """Look at the hub once, and act on what is there.

        Raises:
            HubUnreachable, HubRefused, RegistryError, OSError: nothing changed; try again later.
        """
        if not self._checked:
            self._check_disk()
        try:
            answer = self._hub.manifest(self._settings.model, self._settings.tag, self._etag)
        except HubRefused as error:
            if error.status != 404:
                raise
            return  # the hub has no such model yet
        if answer is not None:
            self._manifest, self._etag = answer
        digest = f"sha256:{hashlib.sha256(self._manifest).hexdigest()}"
        self._state.update(champion=digest)
        current = self._shelf.current()
        if current and digest in (current.serving, current.pinned):
            if current.pinned not in (None, digest):  # the hub went back by itself: nothing to hold off any more
                self._shelf.activate(digest, self._settings.keep_versions)
            return
        if self._is_refused(digest):
            return
        try:
            manifest = parse_manifest(self._manifest)
        except ArtifactInvalid as error:
            self._refuse(digest, "", "manifest", str(error))
            return
        version = manifest.annotations.get("org.opencontainers.image.version", "")[:100]
        try:
            if not self._shelf.has(digest):
                self._pull(digest, manifest)
        except ModelUnfit as error:
            self._refuse(digest, version, error.code, str(error))
        except SignatureRefused as error:
            self._refuse(digest, version, "signature", error.reason)
        else:
            self._shelf.activate(digest, self._settings.keep_versions)
            log.info("%s %s is current (%s)", self._settings.model, version, digest)

    def _pull(self, digest: str, manifest: Manifest) -> None:
        self._shelf.clear_incoming(keep=digest)
        incoming = self._shelf.incoming(digest)
        files = manifest.files()
        missing = sum(blob.size for name, blob in files.items() if not (incoming / name).exists())
        free = shutil.disk_usage(incoming).free
        if missing + SPARE_BYTES > free:
            raise OSError(
                f"The model needs {missing:,} bytes and the disk of {incoming} has {free:,}; make room there."
            )
        for name, blob in files.items():
            try:
                self._hub.download(self._settings.model, blob, incoming / name)
            except BlobDamaged:
                try:  # once more: it may have been the way here
                    self._hub.download(self._settings.model, blob, incoming / name)
                except BlobDamaged as error:
                    raise ModelUnfit("digest", str(error)) from error
        verify(incoming, self._settings.public_key_path)
        engine = Engine(incoming, digest, threads=self._settings.threads)
        if engine.config.name != self._settings.model:
            raise ModelUnfit("config", f"This is the model {engine.config.name!r}, not {self._settings.model!r}.")
        engine.check_golden(incoming)
        self._shelf.add(digest, self._manifest)

    def _check_disk(self) -> None:
        """Look whether the served model is still whole, once in the life of this process: disks fail too.

        This is not about trust: a model that was verified goes on although the key was exchanged since.
        """
        current = self._shelf.current()
        if current is not None and not self._shelf.is_whole(current.serving):
            log.error("the model %s is damaged on this disk; it is removed and fetched again", current.serving)
            self._shelf.discard(current.serving)
        self._checked = True

    def _is_refused(self, digest: str) -> bool:
        key = _digest_of_key(self._settings)
        if key != self._state.state.key:  # another key may well accept what the old one did not
            self._state.update(key=key, refusals=[])
        if self._state.state.refusal(digest) is None:
            return False
        return time.monotonic() - self._refused_at.setdefault(digest, time.monotonic()) < REFUSED_AGAIN_S

    def _refuse(self, digest: str, version: str, code: str, message: str) -> None:
        self._refused_at[digest] = time.monotonic()
        model = RefusedModel(digest=digest, version=version, reason=f"{code}: {message}", at=utc_now())
        self._state.refuse(Refusal(code=code, model=model))
        self._shelf.clear_incoming()
        log.error(
            "%s %s (%s) was refused, the model before it goes on: %s", self._settings.model, version, digest, message
        )


class Courier:
    """Bring corrections to the hub, and reports."""

    def __init__(
        self,
        settings: EdgeSettings,
        hub: HubClient,
        outbox: Outbox,
        predictions: PredictionLog,
        shelf: ModelShelf,
        state: StateFile,
    ) -> None:
        self._settings = settings
        self._name = edge_name(settings)
        self._hub = hub
        self._outbox = outbox
        self._predictions = predictions
        self._shelf = shelf
        self._state = state
        self._batch = MAX_BATCH
        self._reported: tuple[float, EdgeReport] | None = None

    def step(self) -> None:
        """Send all that waits, then a report if there is something new to say.

        Raises:
            HubUnreachable, HubRefused: what was not sent waits on.
        """
        while corrections := self._outbox.waiting(self._batch, BATCH_BYTES):
            self._deliver(corrections)
        report = self._report()
        if self._reported is None or self._reported[1] != report or time.monotonic() > self._reported[0] + REPORT_S:
            self._hub.report(report)
            self._reported = time.monotonic(), report

    def _deliver(self, corrections: list[Correction]) -> None:
        try:
            receipt = self._hub.send(CorrectionBatch(edge=self._name, corrections=corrections))
        except HubRefused as error:
            if error.status not in (400, 413, 422):
                raise
            # The hub cannot read this batch: find the correction that it stumbles over, and set that aside.
            if len(corrections) == 1:
                self._outbox.settle([], [RefusedCorrection(id=corrections[0].id, reason=str(error))])
            else:
                self._batch = len(corrections) // 2
            return
        sent = {correction.id for correction in corrections}
        answered = {*receipt.stored, *receipt.known, *(refused.id for refused in receipt.refused)}
        if not sent & answered:
            raise HubUnreachable("The hub's receipt names none of the corrections that were sent; they wait on.")
        self._outbox.settle(
            [id for id in (*receipt.stored, *receipt.known) if id in sent],
            [refused for refused in receipt.refused if refused.id in sent],
        )
        self._batch = min(MAX_BATCH, self._batch * 2)

    def _report(self) -> EdgeReport:
        state = self._state.state
        refusal = state.refusal(state.champion)
        current = self._shelf.current()
        return EdgeReport(
            edge=self._name,
            serving=self._shelf.describe(current.serving) if current else None,
            refused=refusal.model if refusal else None,
            outbox=self._outbox.count("waiting"),
            set_aside=self._outbox.count("refused"),
            predictions=self._predictions.total(),
            software=__version__,
            url=_url_of(self._settings),
        )


def run_sync(settings: EdgeSettings) -> None:
    """Keep this edge and its hub in step until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="millpond edge: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    files = EdgeFiles(settings.home)
    state = StateFile(files.sync)
    shelf = ModelShelf(files.models)
    models = ModelSync(settings, HubClient(settings.hub, settings.hub_token), shelf, state)
    courier = Courier(
        settings,
        HubClient(settings.hub, settings.hub_token),
        Outbox(files.outbox, settings.max_outbox),
        PredictionLog(files.predictions, settings.keep_predictions),
        shelf,
        state,
    )
    for name, step in (("models", models.step), ("corrections", courier.step)):
        threading.Thread(target=_repeat, args=(name, step, settings.sync_s, state), name=name, daemon=True).start()
    stop.wait()


def _repeat(name: str, step: Callable[[], None], pause_s: float, state: StateFile) -> None:
    """Call `step` for ever, with growing pauses while it fails."""
    failures = 0
    while True:
        try:
            step()
            failures = 0
            state.attempted(name, None)
        except (MillpondError, OSError, sqlite3.Error) as error:
            if failures == 0:
                log.warning("%s: %s", name, error)
            failures += 1
            state.attempted(name, str(error))
        except BaseException:
            log.exception("%s failed", name)
            os._exit(1)  # the master starts this process again
        time.sleep(pause(failures, pause_s))


def pause(failures: int, pause_s: float) -> float:
    """Return the seconds to the next attempt: doubled by each failure, and scattered, so that edges spread out."""
    longest = min(max(MAX_PAUSE_S, pause_s), pause_s * 2.0 ** min(failures, 20))
    return longest if failures == 0 else longest * random.uniform(0.5, 1.0)


def _url_of(settings: EdgeSettings) -> str:
    """Return where this edge's page is, as well as it can be known from here; "" where the system chose the port."""
    host = platform.node() if settings.bind in ("0.0.0.0", "::") else settings.bind  # noqa: S104  (compared, not bound)
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{settings.port}" if settings.port else ""


def _digest_of_key(settings: EdgeSettings) -> str:
    try:
        return hashlib.sha256(settings.public_key_path.read_bytes()).hexdigest()
    except OSError as error:
        raise RegistryError(
            f"The public key {settings.public_key_path} cannot be read ({error}), so no model can be verified. "
            "Copy it from the training site, or name it in MILLPOND_EDGE_PUBLIC_KEY."
        ) from error
