"""What crosses HTTP between hub and edge, and the directory between hub and training job.

Every message is a frozen msgspec struct: decoding checks types, fields that are not known are ignored (a newer
peer may send more), fields that were added later have defaults (an older peer may send less).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Label = Annotated[str, Meta(min_length=1, max_length=200)]
Identifier = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$(?!\n)")]
Note = Annotated[str, Meta(max_length=2000)]

MAX_CORRECTION_BYTES = 1024 * 1024
"""Longest text of a correction, in bytes of UTF-8; edge and hub both refuse more."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything here: immutable, keyword only."""


class ModelRef(Message, frozen=True, kw_only=True):
    """A model that an edge serves: `version` is for people, `digest` (of the OCI manifest) for machines."""

    name: str
    version: str
    digest: str


# --- edge → hub: corrections -------------------------------------------------------------------------------------


class Correction(Message, frozen=True, kw_only=True):
    """One text that the edge got wrong (or was told so): what it said, and what a person says it is."""

    id: Identifier
    text: str
    label: Label
    predicted: str | None = None
    scores: dict[str, float] = {}
    model: ModelRef | None = None
    note: Note = ""
    created: str = ""
    """When the edge took it in, RFC 3339, UTC."""


class CorrectionBatch(Message, frozen=True, kw_only=True):
    """`POST /api/v1/corrections`: corrections of one edge, at most `MAX_BATCH`."""

    edge: Identifier
    corrections: list[Correction]


MAX_BATCH = 200
"""Corrections in one batch, at most."""


class RefusedCorrection(Message, frozen=True, kw_only=True):
    """A correction that the hub will never take, and why; the edge keeps it aside and does not send it again."""

    id: str
    reason: str


class CorrectionReceipt(Message, frozen=True, kw_only=True):
    """The hub's answer: `stored` are on its disk now or were before (`known`); both may leave the outbox."""

    stored: list[str]
    known: list[str]
    refused: list[RefusedCorrection]


# --- edge → hub: how it is ---------------------------------------------------------------------------------------


class RefusedModel(Message, frozen=True, kw_only=True):
    """A model that an edge would not serve, and why (signature, digest, golden answer, …)."""

    digest: str
    version: str
    reason: str
    at: str


class EdgeReport(Message, frozen=True, kw_only=True):
    """`POST /api/v1/edges`: what an edge serves, what it refused, what waits in its outbox."""

    edge: Identifier
    serving: ModelRef | None
    refused: RefusedModel | None = None
    outbox: int = 0
    set_aside: int = 0
    predictions: int = 0
    software: str = ""
    url: str = ""


class EdgeReportReceipt(Message, frozen=True, kw_only=True):
    """The hub's answer: the champion it knows, so that an edge can pull at once."""

    champion: ModelRef | None


# --- hub → training job → hub: files in the job's directory ------------------------------------------------------


class JobSpec(Message, frozen=True, kw_only=True):
    """`job.json`, written by the hub. The job reads it and the two JSONL files of `LabelledText` beside it."""

    id: str
    model: str
    version: str
    """Version that the candidate will carry, such as `v7`."""
    recipe: str
    """Path of the recipe (TOML)."""
    registry: str
    """Root directory of the registry that takes the candidate."""
    private_key: str
    """Path of the signing key."""
    champion: str | None = None
    """Manifest digest of the model that the candidate is measured against."""
    corrections: str = "corrections.jsonl"
    """Accepted corrections to train on."""
    heldout: str = "heldout.jsonl"
    """Accepted corrections that never train: promotion is measured on them."""
    checkpoints: str = "checkpoints"
    """Directory, relative to the job's, where training leaves what it resumes from when the job is tried again."""


class LabelledText(Message, frozen=True, kw_only=True):
    """One line of a JSONL file of training data."""

    text: str
    label: str
    id: str = ""


class PairedCount(Message, frozen=True, kw_only=True):
    """Champion and candidate on the same rows: how often both, one or neither were right."""

    rows: int
    both_right: int
    only_champion_right: int
    only_candidate_right: int

    @property
    def champion_accuracy(self) -> float:
        """Return the share of rows that the champion got right (0 without rows)."""
        return (self.both_right + self.only_champion_right) / self.rows if self.rows else 0.0

    @property
    def candidate_accuracy(self) -> float:
        """Return the share of rows that the candidate got right (0 without rows)."""
        return (self.both_right + self.only_candidate_right) / self.rows if self.rows else 0.0


class JobResult(Message, frozen=True, kw_only=True):
    """`result.json`, written by the job as its last act: the signed candidate and how it compares.

    Without a champion `test` and `heldout` count the candidate alone (`both_right` and
    `only_champion_right` are 0). `by_source` divides both by where the rows are from: files, held-out corrections.
    """

    digest: str
    version: str
    test: PairedCount
    heldout: PairedCount
    official_test: bool
    by_source: dict[str, PairedCount] = {}
    metrics: dict[str, float] = {}
    seconds: dict[str, float] = {}


class JobProgress(Message, frozen=True, kw_only=True):
    """One line of `progress.jsonl`, appended by the job: where it is, for the hub's pages."""

    stage: Literal["data", "train", "evaluate", "export", "register"]
    done: int = 0
    total: int = 0
    loss: float | None = None
    accuracy: float | None = None
    note: str = ""
