"""Answers from a model directory, with ONNX Runtime on the CPU; and the check that a model answers as it should.

An engine never changes: another model is another engine. `LiveEngine` holds the one that is served and exchanges
it when `current.json` changes; a request keeps the engine that it began with.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from millpond import MillpondError
from millpond.edge.models import Current, ModelShelf
from millpond.registry import parse_config
from millpond.registry.manifest import CONFIG_FILE
from millpond.schema import ModelRef
from millpond.text import TextEncoder, pad

log = logging.getLogger("millpond.edge")

RUN_FLOATS = 2**26
"""Numbers that one run may compute, padding included: one long text among many short ones must not blow it up."""
GOLDEN_TOLERANCE = 1e-4
"""Largest difference of a probability from the golden one: other processors round differently, not more."""
MAX_GOLDEN_BYTES = 64 * 1024 * 1024
LOOK_S = 0.2
"""Seconds between looks at `current.json`."""
LOAD_AGAIN_S = 10.0
"""Seconds between attempts to load a model that could not be loaded."""


class ModelUnfit(MillpondError):
    """A model cannot be served; `code` is short and fixed, for metrics."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Golden(msgspec.Struct, frozen=True):
    text: str
    scores: dict[str, float]


class Engine:
    """One loaded model."""

    def __init__(self, model_dir: Path, digest: str, *, threads: int) -> None:
        """Load a model.

        Raises:
            ModelUnfit: its files do not make a model that can be run.
        """
        try:
            self.config = parse_config((model_dir / CONFIG_FILE).read_bytes())
            self._encoder = TextEncoder.from_dir(model_dir)
        except (MillpondError, OSError) as error:
            raise ModelUnfit("config", str(error)) from error
        self.labels = self.config.labels
        self.ref = ModelRef(name=self.config.name, version=self.config.version, digest=digest)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False  # every length is different: an arena would only grow
        options.enable_mem_pattern = False
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                str(model_dir / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
            self.scores(["."])
        except ModelUnfit:
            raise
        except Exception as error:  # the runtime's exceptions have no common class but this one
            raise ModelUnfit("engine", f"model.onnx cannot be run: {str(error)[:300]}") from error

    def scores(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return probabilities [texts, labels].

        Raises:
            ModelUnfit: the model answers with numbers that are no logits of its labels.
        """
        rows = self._encoder.encode(texts)
        logits = np.empty((len(rows), len(self.labels)), np.float64)
        for run in _runs([len(row) for row in rows], RUN_FLOATS // self.config.floats_per_id):
            (part,) = self._session.run(["logits"], {"ids": pad([rows[index] for index in run])})
            if part.shape != (len(run), len(self.labels)):
                raise ModelUnfit("labels", f"model.onnx answers {part.shape[1:]} for {len(self.labels)} labels.")
            logits[run] = part
        if not np.isfinite(logits).all():
            raise ModelUnfit("engine", "model.onnx answers with what is not a number.")
        odds: NDArray[np.float64] = np.exp(logits - logits.max(axis=1, keepdims=True))
        odds /= odds.sum(axis=1, keepdims=True)
        return odds

    def check_golden(self, model_dir: Path) -> None:
        """Compute the answers of `golden.jsonl` again.

        Raises:
            ModelUnfit: an answer differs by more than `GOLDEN_TOLERANCE`, names other labels, or there is none.
        """
        path = model_dir / "golden.jsonl"
        try:
            if path.stat().st_size > MAX_GOLDEN_BYTES:
                raise ModelUnfit("golden", "golden.jsonl is larger than a dozen texts can be.")
            golden = msgspec.json.Decoder(_Golden).decode_lines(path.read_bytes())
        except (OSError, msgspec.MsgspecError) as error:
            raise ModelUnfit("golden", f"golden.jsonl cannot be read: {error}") from error
        if not golden:
            raise ModelUnfit("golden", "golden.jsonl is empty, so nothing shows that the model answers as it should.")
        for number, wanted in enumerate(golden, 1):
            if wanted.scores.keys() != set(self.labels):
                raise ModelUnfit("labels", f"golden.jsonl line {number} has other labels than config.json.")
        scores = self.scores([wanted.text for wanted in golden])
        for number, (wanted, found) in enumerate(zip(golden, scores, strict=True), 1):
            for label, score in zip(self.labels, found.tolist(), strict=True):
                if not abs(score - wanted.scores[label]) <= GOLDEN_TOLERANCE:
                    raise ModelUnfit(
                        "golden",
                        f"golden.jsonl line {number} wants {wanted.scores[label]:.6f} for {label!r}, "
                        f"and this edge computes {score:.6f}.",
                    )


class LiveEngine:
    """The engine that is served in this process; a thread of its own exchanges it."""

    def __init__(self, shelf: ModelShelf, threads: int) -> None:
        self._shelf = shelf
        self._threads = threads
        self._engine: Engine | None = None
        self._failed: tuple[Current, float] | None = None
        self._closed = threading.Event()
        self._looking = threading.Lock()
        self.follow()
        threading.Thread(target=self._follow_forever, name="engine", daemon=True).start()

    def close(self) -> None:
        """Stop following; the present engine stays."""
        self._closed.set()

    @property
    def engine(self) -> Engine | None:
        """Return the present engine; None before the first model."""
        if self._engine is None:  # a worker beside this one may have seen the first model, and said so, already
            self.follow()
        return self._engine

    def follow(self) -> None:
        """Load what `current.json` names, if it is another model than the present one.

        Where that fails the old engine serves on; if there is none, the newest version that can be loaded does.
        Sync has tried this very model, so it is the disk that fails, or a file that was removed a moment ago.
        """
        with self._looking:
            self._follow()

    def _follow(self) -> None:
        current = self._shelf.current()
        if current is None or (self._engine and self._engine.ref.digest == current.serving):
            return
        if self._failed and self._failed[0] == current and time.monotonic() < self._failed[1] + LOAD_AGAIN_S:
            return
        for digest in [current.serving] if self._engine else reversed(current.history):
            try:
                engine = Engine(self._shelf.path(digest), digest, threads=self._threads)
            except MillpondError as error:
                log.error("%s cannot be loaded from this disk: %s", digest, error)
                self._failed = current, time.monotonic()
            else:
                self._engine = engine  # one assignment: each request sees the old engine or the new one
                return

    def _follow_forever(self) -> None:
        while not self._closed.wait(LOOK_S):
            try:
                self.follow()
            except Exception:  # whatever it was, the next look may fare better; this thread must not end
                log.exception("the current model cannot be looked up")


def _runs(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Split texts into runs of similar length, of at most `most` ids each (a longer text runs alone)."""
    run: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if run and (len(run) + 1) * lengths[index] > most:
            yield run
            run = []
        run.append(index)
    if run:
        yield run
