"""JSON in and out, typed by msgspec: what does not fit the type is refused with the name of the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import flask
import msgspec

from millpond.web.errors import ApiError

T = TypeVar("T")


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> flask.Response:
    """Return `body` (structs, dicts, lists…) as JSON."""
    return flask.Response(msgspec.json.encode(body), status, headers, mimetype="application/json")


def read_json(type: type[T]) -> T:
    """Return the current request's body as a `type`.

    Raises:
        ApiError: 415 not JSON, 413 too large, 400 not valid JSON or not of the type; the message names the field.
    """
    request = flask.request
    if request.mimetype != "application/json":
        raise ApiError(
            415,
            "unsupported_media_type",
            f"The body's content type is {request.mimetype[:100] or 'missing'}; this address takes application/json.",
            "Send JSON with the header Content-Type: application/json.",
        )
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise ApiError(
            415,
            "unsupported_encoding",
            "Compressed bodies are not taken here.",
            "Send the JSON without Content-Encoding.",
        )
    body = request.get_data(cache=False)
    if request.content_length is None and len(body) >= (request.max_content_length or len(body) + 1):
        flask.abort(413)  # chunked: werkzeug stops at the limit without a word
    try:
        return msgspec.json.decode(body, type=type)
    except msgspec.ValidationError as error:
        raise ApiError(
            400,
            "invalid_request",
            f"The body is JSON, but not what this address takes: {error}.",
            "Correct the named field; /openapi.json describes what is accepted.",
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(
            400, "invalid_json", f"The body is not valid JSON: {error}.", "Send one JSON object in UTF-8."
        ) from None
