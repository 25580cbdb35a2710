"""What an HTTP caller is told when a request cannot be answered: a code, what happened, what to do next."""

from __future__ import annotations

from collections.abc import Mapping

import flask
import msgspec
from werkzeug.exceptions import HTTPException, MethodNotAllowed


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """`code` is for programs and does not change; `message` and `next` are for people."""

    code: str
    message: str
    next: str


class ErrorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer with a status of 400 or more."""

    error: ErrorDetail


class ApiError(Exception):
    """Raise in a view to answer with `status` and an `ErrorAnswer`."""

    def __init__(self, status: int, code: str, message: str, next: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(code=code, message=message, next=next)
        self.headers = dict(headers or {})


_KNOWN = {
    400: ("bad_request", "The request cannot be understood.", "Correct it; /openapi.json describes what is accepted."),
    404: ("not_found", "There is nothing at this address.", "See /openapi.json for the addresses that exist."),
    405: ("method_not_allowed", "This address does not take that method.", "See /openapi.json for the methods."),
    413: ("request_too_large", "The request's body is larger than this service takes.", "Send less at a time."),
    500: (
        "internal_error",
        "The service failed on this request.",
        "Try again; if it stays, look into the service's log.",
    ),
}


def register_errors(app: flask.Flask) -> None:
    """Make every error of `app` an `ErrorAnswer`, or a page where a browser asked for one."""

    @app.errorhandler(ApiError)
    def api_error(error: ApiError) -> flask.Response:
        return _answer(error.status, error.detail, error.headers)

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> flask.Response:
        status = error.code or 500
        if status < 400:  # a redirect that routing makes, such as for a missing slash
            response = error.get_response()
            return flask.Response(response.get_data(), status, dict(response.headers))
        code, message, next = _KNOWN.get(
            status, (f"http_{status}", error.description or error.name, "Correct the request.")
        )
        if status == 413 and flask.request.max_content_length:
            message = f"The request's body is larger than the {flask.request.max_content_length:,} bytes taken here."
        methods = error.valid_methods if isinstance(error, MethodNotAllowed) else None
        allow = {"Allow": ", ".join(sorted(methods))} if methods else {}
        return _answer(status, ErrorDetail(code=code, message=message, next=next), allow)

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> flask.Response:
        app.logger.exception("%s %s failed", flask.request.method, flask.request.path)
        code, message, next = _KNOWN[500]
        return _answer(500, ErrorDetail(code=code, message=message, next=next), {})


def _answer(status: int, detail: ErrorDetail, headers: Mapping[str, str]) -> flask.Response:
    accepted = flask.request.accept_mimetypes
    if accepted["text/html"] > accepted["application/json"]:
        response = flask.make_response(flask.render_template("error.html", error=detail, status=status), status)
    else:
        body = msgspec.json.encode(ErrorAnswer(error=detail))
        response = flask.Response(body, status, mimetype="application/json")
    response.headers.update(headers)
    return response
