"""A small application on the web ground, with three roles and a view for each thing that is tested."""

from __future__ import annotations

from collections.abc import Callable

import flask
import msgspec
import pytest
from flask.typing import ResponseReturnValue

from millpond.web import Access, ApiError, add_openapi, create_app, documented, json_response, read_json

TOKENS = {"edge": "edge-token-1", "reviewer": "reviewer-token-2", "operator": "operator-token-3"}
MAX_BYTES = 1000


class Order(msgspec.Struct):
    """What `/orders` takes."""

    item: str
    count: int = 1


def build(tokens: dict[str, str]) -> flask.Flask:
    access = Access("hub", tokens)
    app = create_app("millpond.web", access=access, max_request_bytes=MAX_BYTES)

    @app.post("/orders")
    @documented(body=Order, answer=Order, errors={400: "Not valid"})
    @access.required("edge")
    def orders() -> ResponseReturnValue:
        """Take an order.

        Not part of the summary.
        """
        return json_response(read_json(Order))

    @app.get("/reviews/<int:number>")
    @documented(answer=dict[str, int])
    @access.required("reviewer")
    def reviews(number: int) -> ResponseReturnValue:
        """Show a review."""
        return json_response({"number": number})

    @app.get("/page")
    @access.required("edge", page=True)
    def page() -> ResponseReturnValue:
        return flask.render_template("page.html")

    @app.get("/busy")
    def busy() -> ResponseReturnValue:
        raise ApiError(503, "busy", "Too much to do.", "Come back.", {"Retry-After": "7"})

    @app.get("/broken")
    def broken() -> ResponseReturnValue:
        raise ValueError("a secret detail")

    add_openapi(app, "Test")
    return app


@pytest.fixture
def guarded() -> flask.Flask:
    """Return the application with all tokens set."""
    return build(TOKENS)


@pytest.fixture
def open_app() -> flask.Flask:
    """Return the application without any token."""
    return build(dict.fromkeys(TOKENS, ""))


@pytest.fixture
def build_app() -> Callable[[dict[str, str]], flask.Flask]:
    """Return the function that builds the application with other tokens."""
    return build
