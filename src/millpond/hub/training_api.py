"""Training and its outcome: jobs, promotions, rollback, and the state of the whole loop in one answer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import flask
import msgspec
from flask.typing import ResponseReturnValue
from msgspec import Meta

from millpond.hub import corrections, edges, jobs, promotions
from millpond.hub.feedback_api import number_argument
from millpond.hub.jobs import JobState, JobView
from millpond.hub.promotions import NothingToRollBack, PromotionView
from millpond.hub.state import Hub
from millpond.registry import PushedModel
from millpond.web import Access, ApiError, documented, json_response, read_json

MAX_JOBS = 200


class ByHand(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /api/v1/jobs` and `POST /api/v1/rollback`: who asks for it."""

    by: Annotated[str, Meta(min_length=1, max_length=200)] = "an operator"


class JobStarted(msgspec.Struct, frozen=True, kw_only=True):
    """The job's id; `already` if it was there before, for one runs at a time."""

    id: str
    state: JobState
    already: bool


class JobsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /api/v1/jobs`."""

    jobs: list[JobView]


class PromotionsAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /api/v1/promotions`."""

    promotions: list[PromotionView]


class LoopState(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /api/v1/state`: the loop at a glance."""

    model: str
    champion: PushedModel | None
    corrections: dict[str, int]
    corrections_by_edge: dict[str, dict[str, int]]
    accepted_since_training: int
    retrain_after: int
    why_no_training: str | None
    jobs: list[JobView]
    promotions: list[PromotionView]
    edges: list[edges.EdgeView]
    can_roll_back: bool


def blueprint(hub: Hub, access: Access) -> flask.Blueprint:
    """Return the addresses for operators."""
    api = flask.Blueprint("training", __name__, url_prefix="/api/v1")

    @api.post("/jobs")
    @documented(body=ByHand, answer=JobStarted, status=202, errors={409: "Training is not set up."})
    @access.required("operator")
    def start() -> ResponseReturnValue:
        """Start a training by hand; 200 with the active job's id where one is queued or running."""
        request = read_json(ByHand)
        if why := hub.why_no_training():
            raise ApiError(409, "cannot_train", "This hub cannot start a training.", why)
        number, is_new = jobs.create(hub.database, f"started by {request.by}", time.time())
        job = known_job(hub, f"job-{number}")
        return json_response(JobStarted(id=job.id, state=job.state, already=not is_new), 202 if is_new else 200)

    @api.get("/jobs")
    @documented(answer=JobsAnswer)
    @access.required("operator")
    def all_jobs() -> ResponseReturnValue:
        """Return training jobs, newest first."""
        return json_response(JobsAnswer(jobs=jobs.newest(hub, number_argument("limit", 50, MAX_JOBS))))

    @api.get("/jobs/<job_id>")
    @documented(answer=JobView, errors={404: "No such job."})
    @access.required("operator")
    def one_job(job_id: str) -> ResponseReturnValue:
        """Return one job: its state, its progress, its result or error."""
        return json_response(known_job(hub, job_id))

    @api.get("/jobs/<job_id>/log")
    @documented(errors={404: "No such job."})
    @access.required("operator")
    def log(job_id: str) -> ResponseReturnValue:
        """Return the end of the newest attempt's log, as text."""
        return flask.Response(jobs.read_log(directory_of(hub, job_id)), mimetype="text/plain")

    @api.get("/jobs/<job_id>/progress")
    @documented(errors={404: "No such job."})
    @access.required("operator")
    def progress(job_id: str) -> ResponseReturnValue:
        """Return what the newest attempt said of its progress, oldest first."""
        return json_response({"progress": jobs.read_progress(directory_of(hub, job_id))})

    @api.get("/promotions")
    @documented(answer=PromotionsAnswer)
    @access.required("operator")
    def all_promotions() -> ResponseReturnValue:
        """Return promotions, refusals and rollbacks with their reasons, newest first."""
        return json_response(PromotionsAnswer(promotions=promotions.newest(hub, number_argument("limit", 100))))

    @api.post("/rollback")
    @documented(body=ByHand, answer=PromotionView, errors={409: "There is nothing to go back to."})
    @access.required("operator")
    def roll_back() -> ResponseReturnValue:
        """Make the champion before the present one the champion again."""
        request = read_json(ByHand)
        try:
            return json_response(promotions.roll_back(hub, request.by, time.time()))
        except NothingToRollBack as error:
            raise ApiError(409, "nothing_to_roll_back", str(error), "Train a model first.") from None

    @api.get("/state")
    @documented(answer=LoopState)
    @access.required("operator")
    def state() -> ResponseReturnValue:
        """Return the loop at a glance: champion, versions, corrections, jobs, promotions, edges."""
        return json_response(loop_state(hub))

    return api


def loop_state(hub: Hub) -> LoopState:
    """Return the loop at a glance."""
    seen = jobs.newest_review_seen(hub.database)
    return LoopState(
        model=hub.settings.model,
        champion=hub.champion(),
        corrections=corrections.count_states(hub.database),
        corrections_by_edge=corrections.count_by_edge(hub.database),
        accepted_since_training=corrections.count_accepted_since(hub.database, seen),
        retrain_after=hub.settings.retrain_after,
        why_no_training=hub.why_no_training(),
        jobs=jobs.newest(hub, 10),
        promotions=promotions.newest(hub, 30),
        edges=edges.listed(hub.database, time.time()),
        can_roll_back=promotions.can_roll_back(hub),
    )


def known_job(hub: Hub, job_id: str) -> JobView:
    """Return a job; raises ApiError 404 for an unknown one."""
    number = jobs.number_of(job_id)
    job = jobs.find(hub, number) if number is not None else None
    if job is None:
        raise ApiError(404, "unknown_job", f"There is no job {job_id[:50]!r}.", "GET /api/v1/jobs lists them.")
    return job


def directory_of(hub: Hub, job_id: str) -> Path:
    """Return the directory of a job's newest attempt; raises ApiError 404 for an unknown job."""
    job = known_job(hub, job_id)
    return jobs.directory(hub, int(job.id.removeprefix("job-")), job.attempt)
