"""The edge's HTTP interface: predict, feedback, model, and the page where a person tries and corrects it.

A view checks its input, calls the engine, the prediction log or the outbox, and answers. 202 for feedback is
said only when the correction is on disk.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import uuid
from collections import Counter
from collections.abc import Sequence

import flask
import msgspec
from flask.typing import ResponseReturnValue
from msgspec import UNSET

from millpond.edge.answers import (
    FeedbackAnswer,
    FeedbackEntry,
    FeedbackList,
    FeedbackRequest,
    ModelAnswer,
    PredictionAnswer,
    PredictionsAnswer,
    PredictRequest,
    ServedModel,
    SyncAnswer,
)
from millpond.edge.engine import Engine, LiveEngine, ModelUnfit
from millpond.edge.measure import INFERENCE_SECONDS, NOT_KEPT, PREDICTIONS, EdgeCollector
from millpond.edge.models import ModelShelf
from millpond.edge.outbox import Outbox, OutboxBusy, OutboxFull
from millpond.edge.predictions import Prediction, PredictionLog
from millpond.edge.state import EdgeFiles, edge_name, read_state, utc_now
from millpond.schema import MAX_CORRECTION_BYTES, Correction, ModelRef
from millpond.settings import EdgeSettings
from millpond.web import Access, ApiError, add_openapi, create_app, documented, json_response, read_json
from millpond.web.metrics import add_metrics

log = logging.getLogger("millpond.edge")

ROLE = "caller"
MAX_LATEST = 100
MAX_KEY_LENGTH = 255
SHOWN_CHARACTERS = 200
SEE_API = "See /openapi.json for what is accepted."


class Edge:
    """What the views work with."""

    def __init__(self, settings: EdgeSettings) -> None:
        self.settings = settings
        self.files = EdgeFiles(settings.home)
        self.shelf = ModelShelf(self.files.models)
        self.live = LiveEngine(self.shelf, settings.threads)
        self.predictions = PredictionLog(self.files.predictions, settings.keep_predictions)
        self.outbox = Outbox(self.files.outbox, settings.max_outbox)

    def close(self) -> None:
        """Close files and stop the thread that follows the model."""
        self.live.close()
        self.predictions.close()
        self.outbox.close()

    @property
    def engine(self) -> Engine:
        """Return the engine that answers now; 503 before the first model."""
        engine = self.live.engine
        if engine is None:
            raise ApiError(
                503,
                "no_model",
                "This edge has no verified model yet.",
                "Try again soon; /v1/model says what it is waiting for.",
                {"Retry-After": str(max(1, round(self.settings.sync_s)))},
            )
        return engine

    def predict(self, texts: Sequence[str]) -> tuple[list[PredictionAnswer], ModelRef]:
        """Answer for `texts`, all with one model, and remember the answers."""
        for index, text in enumerate(texts):
            self.check_length(
                text, self.settings.max_text_bytes, f"Text {index} has" if len(texts) > 1 else "The text has"
            )
        engine = self.engine
        try:
            with INFERENCE_SECONDS.time():
                scores = engine.scores(texts)
        except ModelUnfit as error:
            raise ApiError(
                500, "model_failed", str(error), "Report this text; roll back with: millpond edge rollback"
            ) from error
        answers = []
        for row in scores.tolist():
            best = max(range(len(row)), key=row.__getitem__)
            label = engine.labels[best]
            answers.append(
                PredictionAnswer(
                    id=uuid.uuid4().hex, label=label, score=row[best], scores=dict(zip(engine.labels, row, strict=True))
                )
            )
        for label, count in Counter(answer.label for answer in answers).items():
            PREDICTIONS.labels(engine.ref.version, label).inc(count)
        try:
            self.predictions.add(
                [
                    Prediction(id=answer.id, text=text, label=answer.label, scores=answer.scores, model=engine.ref)
                    for text, answer in zip(texts, answers, strict=True)
                ]
            )
        except sqlite3.Error as error:
            NOT_KEPT.inc(len(texts))
            log.error("predictions are not remembered, so feedback cannot name them: %s", error)
        return answers, engine.ref

    def take_in(self, request: FeedbackRequest, key: str) -> FeedbackAnswer:
        """Put a correction into the outbox; the same one given again is the same correction."""
        if (request.id is UNSET) == (request.text is UNSET):
            raise ApiError(400, "invalid_request", "Feedback names either a prediction's id or a text.", SEE_API)
        if request.id is not UNSET:
            correction = self._correction_of(request.id, request)
        else:
            assert request.text is not UNSET
            correction = self._correction_of_text(request.text, request, key)
        try:
            entry = self.outbox.put(correction)
        except OutboxFull as error:
            raise ApiError(507, "insufficient_storage", str(error), "Make room, then send it again.") from error
        except OutboxBusy as error:
            raise ApiError(503, "busy", str(error), "Send it again.", {"Retry-After": "1"}) from error
        if entry.state == "refused":
            raise ApiError(
                409,
                "refused_by_hub",
                f"The hub refused this correction: {entry.reason}",
                "See `millpond edge outbox`; --retry sends refused corrections again.",
            )
        return FeedbackAnswer(id=correction.id, state=entry.state)

    def model(self) -> ModelAnswer:
        """Return what is served and how things stand."""
        engine = self.live.engine
        current = self.shelf.current()
        state = read_state(self.files.sync)
        refusal = state.refusal(state.champion)
        serving = None
        if engine is not None:
            config = engine.config
            serving = ServedModel(
                name=config.name,
                version=config.version,
                digest=engine.ref.digest,
                labels=config.labels,
                architecture=config.architecture,
                created=config.created,
                metrics=config.metrics,
            )
        return ModelAnswer(
            edge=edge_name(self.settings),
            serving=serving,
            refused=refusal.model if refusal else None,
            previous=self.shelf.previous(),
            pinned=current.pinned if current else None,
            sync=SyncAnswer(
                hub=self.settings.hub or None,
                last_contact=state.last_contact,
                errors=state.errors,
                champion=state.champion,
                outbox=self.outbox.count("waiting"),
                set_aside=self.outbox.count("refused"),
            ),
        )

    def check_length(self, text: str, limit: int, whose: str) -> None:
        """Refuse a text of over `limit` bytes."""
        if len(text) * 4 > limit and (size := len(text.encode(errors="surrogatepass"))) > limit:
            raise ApiError(
                413, "text_too_long", f"{whose} {size:,} bytes; at most {limit:,} are read.", "Send a shorter text."
            )

    def _correction_of(self, prediction_id: str, request: FeedbackRequest) -> Correction:
        prediction = self.predictions.get(prediction_id)
        if prediction is None:
            raise ApiError(
                404,
                "unknown_prediction",
                f"No prediction {prediction_id} is remembered here; the last {self.settings.keep_predictions:,} are.",
                "Send the text itself instead of the id.",
            )
        self._check_correction(prediction.text, request, list(prediction.scores))
        return Correction(
            id=_same_id(self.outbox.installation, prediction.id, request.label),
            text=prediction.text,
            label=request.label,
            predicted=prediction.label,
            scores=prediction.scores,
            model=prediction.model,
            note=request.note,
            created=utc_now(),
        )

    def _correction_of_text(self, text: str, request: FeedbackRequest, key: str) -> Correction:
        engine = self.live.engine
        self._check_correction(text, request, engine.labels if engine else None)
        identifier = _same_id(self.outbox.installation, key, text, request.label) if key else uuid.uuid4().hex
        return Correction(id=identifier, text=text, label=request.label, note=request.note, created=utc_now())

    def _check_correction(self, text: str, request: FeedbackRequest, labels: Sequence[str] | None) -> None:
        """Refuse what the hub would never take: a person should hear that now, not find it set aside later."""
        if labels is not None and request.label not in labels:
            raise ApiError(
                400,
                "unknown_label",
                f"{request.label!r} is not a label of this model; it has {', '.join(map(repr, labels[:20]))}.",
                "Use one of its labels.",
            )
        if not text.strip():
            raise ApiError(400, "empty_text", "The text is empty; nothing can be learned from it.", "Send a text.")
        if "\0" in text + request.label + request.note:
            raise ApiError(400, "nul", "A correction cannot hold the character NUL.", "Remove it, then send it again.")
        self.check_length(text, min(self.settings.max_text_bytes, MAX_CORRECTION_BYTES), "The text of a correction has")


def create_edge(settings: EdgeSettings) -> flask.Flask:
    """Return the edge's application; it serves what is on disk at once, and follows `current.json`."""
    access = Access("edge", {ROLE: settings.token})
    app = create_app("millpond.edge", access=access, max_request_bytes=settings.max_request_bytes)
    edge = Edge(settings)
    app.extensions["millpond.edge"] = edge

    @app.post("/v1/predict")
    @documented(
        body=PredictRequest,
        answer=(PredictionAnswer, PredictionsAnswer),
        errors={
            400: "Not valid",
            401: "No token",
            413: "Too long, too many or too large",
            415: "Not JSON",
            503: "No model yet",
        },
    )
    @access.required(ROLE)
    def predict() -> ResponseReturnValue:
        """Classify one text, or several."""
        request = read_json(PredictRequest)
        if (request.text is UNSET) == (request.texts is UNSET):
            raise ApiError(400, "invalid_request", "A request has either a text or texts.", SEE_API)
        if request.text is not UNSET:
            (answer,), model = edge.predict([request.text])
            return json_response(msgspec.structs.replace(answer, model=model))
        assert request.texts is not UNSET
        if not request.texts:
            raise ApiError(400, "no_texts", "The list of texts is empty.", "Send at least one text.")
        if len(request.texts) > settings.max_texts:
            raise ApiError(
                413,
                "too_many_texts",
                f"The request has {len(request.texts):,} texts; at most {settings.max_texts:,} are taken at once.",
                "Send them in several requests.",
            )
        answers, model = edge.predict(request.texts)
        return json_response(PredictionsAnswer(predictions=answers, model=model))

    @app.post("/v1/feedback")
    @documented(
        body=FeedbackRequest,
        answer=FeedbackAnswer,
        status=202,
        errors={
            400: "Not valid, or a label that the model does not have",
            401: "No token",
            404: "Unknown prediction",
            409: "The hub refused this correction before",
            413: "Too long",
            415: "Not JSON",
            507: "No room: nothing was taken in",
        },
    )
    @access.required(ROLE)
    def feedback() -> ResponseReturnValue:
        """Give the right label; 202 when it is on disk. Safe to repeat for an id, or with an Idempotency-Key."""
        key = flask.request.headers.get("Idempotency-Key", "")
        if len(key) > MAX_KEY_LENGTH:
            raise ApiError(
                400, "invalid_request", "The Idempotency-Key is too long.", f"Use at most {MAX_KEY_LENGTH} characters."
            )
        return json_response(edge.take_in(read_json(FeedbackRequest), key), 202)

    @app.get("/v1/feedback")
    @documented(answer=FeedbackList, errors={401: "No token"})
    @access.required(ROLE)
    def latest_feedback() -> ResponseReturnValue:
        """List the latest corrections and what became of them; `?limit=` says how many."""
        limit = flask.request.args.get("limit", 10, type=int)
        entries = [
            FeedbackEntry(
                id=entry.correction.id,
                text=entry.correction.text[:SHOWN_CHARACTERS],
                predicted=entry.correction.predicted,
                label=entry.correction.label,
                note=entry.correction.note,
                state=entry.state,
                reason=entry.reason,
                created=entry.correction.created,
            )
            for entry in edge.outbox.latest(max(1, min(limit, MAX_LATEST)))
        ]
        return json_response(FeedbackList(corrections=entries))

    @app.get("/v1/model")
    @documented(answer=ModelAnswer, errors={401: "No token"})
    @access.required(ROLE)
    def model() -> ResponseReturnValue:
        """Say which model answers, what was refused, what waits for the hub."""
        return json_response(edge.model())

    @app.get("/readyz")
    @documented(answer=dict[str, str], open=True, errors={503: "No verified model is loaded yet"})
    def readyz() -> ResponseReturnValue:
        """Say whether a verified model is loaded."""
        return json_response({"status": "ready", "version": edge.engine.ref.version})

    @app.get("/")
    @access.required(ROLE, page=True)
    def page() -> ResponseReturnValue:
        return flask.render_template("edge.html", edge=edge_name(settings), max_text_bytes=settings.max_text_bytes)

    add_metrics(app, access, ROLE, [EdgeCollector(edge.live, edge.shelf, edge.outbox, edge.files.sync)])
    add_openapi(app, "Millpond edge")
    return app


def _same_id(*parts: str) -> str:
    """Return an identifier that is the same for the same parts."""
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]
