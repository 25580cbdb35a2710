"""What the edge's HTTP interface takes and answers; `/openapi.json` is made from these."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from millpond.edge.outbox import State
from millpond.schema import Identifier, Label, ModelRef, Note, RefusedModel


class PredictRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One `text`, or several `texts`."""

    text: str | UnsetType = UNSET
    texts: list[str] | UnsetType = UNSET


class PredictionAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer for one text; `id` is what feedback names, `score` the probability of `label`."""

    id: str
    label: str
    score: float
    scores: dict[str, float]
    model: ModelRef | UnsetType = UNSET
    """Given for a single text; for several it stands once, beside `predictions`."""


class PredictionsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The answers for several texts, in their order, all of one model."""

    predictions: list[PredictionAnswer]
    model: ModelRef


class FeedbackRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The right label of a prediction (`id`), or of a `text`."""

    label: Label
    id: Identifier | UnsetType = UNSET
    text: str | UnsetType = UNSET
    note: Note = ""


class FeedbackAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The correction is on this edge's disk under `id`; `state` is `waiting`, or `stored` once the hub has it."""

    id: str
    state: State


class FeedbackEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A correction and what became of it; `reason` says why the hub refused it."""

    id: str
    text: str
    predicted: str | None
    label: str
    note: str
    state: State
    reason: str
    created: str


class FeedbackList(msgspec.Struct, frozen=True, kw_only=True):
    """The latest corrections, the newest first; texts are shortened."""

    corrections: list[FeedbackEntry]


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """The model that answers."""

    name: str
    version: str
    digest: str
    labels: list[str]
    architecture: str
    created: str
    metrics: dict[str, float]


class SyncAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How this edge and its hub stand: when the hub last answered, why not since, what waits for it."""

    hub: str | None
    last_contact: str | None
    errors: dict[str, str]
    champion: str | None
    outbox: int
    set_aside: int


class ModelAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What is served, what was refused and why, what `millpond edge rollback` would go back to."""

    edge: str
    serving: ServedModel | None
    refused: RefusedModel | None
    previous: list[ModelRef]
    pinned: str | None
    sync: SyncAnswer
