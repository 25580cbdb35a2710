"""The operators' pages: the loop at a glance, one job, one promotion, all models. Scripts fill them from the API."""

from __future__ import annotations

import flask
from flask.typing import ResponseReturnValue

from millpond.hub import promotions
from millpond.hub.state import Hub
from millpond.hub.training_api import known_job
from millpond.web import Access, ApiError


def blueprint(hub: Hub, access: Access) -> flask.Blueprint:
    """Return the pages."""
    pages = flask.Blueprint("console", __name__)

    @pages.get("/")
    @access.required("edge", page=True)
    def home() -> ResponseReturnValue:
        """Show the loop; a reviewer is sent to the review page."""
        if access.role() == "reviewer":
            return flask.redirect(flask.url_for("review.page"))
        return operators_home()

    @access.required("operator", page=True)
    def operators_home() -> ResponseReturnValue:
        return flask.render_template("console.html", model=hub.settings.model)

    @pages.get("/jobs/<job_id>")
    @access.required("operator", page=True)
    def job(job_id: str) -> ResponseReturnValue:
        """Show one training job."""
        return flask.render_template("job.html", job=known_job(hub, job_id))

    @pages.get("/promotions/<int:number>")
    @access.required("operator", page=True)
    def promotion(number: int) -> ResponseReturnValue:
        """Show why a candidate was promoted or refused."""
        record = promotions.find(hub, number) if number < 2**31 else None
        if record is None:
            raise ApiError(404, "unknown_promotion", f"There is no record {number}.", "The start page lists them.")
        return flask.render_template("promotion.html", record=record)

    @pages.get("/models")
    @access.required("operator", page=True)
    def models() -> ResponseReturnValue:
        """Show all versions of the model."""
        return flask.render_template("models.html", models=hub.models(), model=hub.settings.model)

    return pages
