"""`create_app`: the Flask application that hub and edge add their addresses to."""

from __future__ import annotations

import flask
from flask.typing import ResponseReturnValue

from millpond.web.access import Access
from millpond.web.errors import register_errors
from millpond.web.json import json_response
from millpond.web.openapi import documented

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
MAX_FORM_BYTES = 64 * 1024
"""Largest login form."""


def create_app(import_name: str, *, access: Access, max_request_bytes: int) -> flask.Flask:
    """Return an application with JSON errors, security headers, `/healthz`, the login page and the shared look.

    Its templates extend `page.html` (blocks title, part, nav, content, scripts) and find `millpond.css` at
    `url_for("web.static", filename="millpond.css")`; own templates and static files lie beside `import_name`.
    """
    app = flask.Flask(import_name)
    app.config["MAX_CONTENT_LENGTH"] = max_request_bytes
    app.config["MAX_FORM_MEMORY_SIZE"] = min(max_request_bytes, MAX_FORM_BYTES)
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    register_errors(app)
    app.before_request(access.refuse_other_sites)
    app.register_blueprint(_shared(access))

    @app.after_request
    def secure(response: flask.Response) -> flask.Response:
        for name, value in SECURITY_HEADERS.items():
            response.headers.setdefault(name, value)
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    @app.context_processor
    def shared_values() -> dict[str, object]:
        return {"program": access.program, "role": access.role(), "has_login": not access.is_open}

    return app


def _shared(access: Access) -> flask.Blueprint:
    web = flask.Blueprint("web", __name__, template_folder="templates", static_folder="static", static_url_path="/web")

    @web.get("/healthz")
    @documented(answer=dict[str, str], open=True)
    def healthz() -> ResponseReturnValue:
        """Say that the process lives."""
        return json_response({"status": "ok"})

    @web.get("/login")
    def login() -> ResponseReturnValue:
        return flask.render_template("login.html", next=_own_path(flask.request.args.get("next", "/")), wrong=False)

    @web.post("/login")
    def log_in() -> ResponseReturnValue:
        target = _own_path(flask.request.form.get("next", "/"))
        role = access.role_of(flask.request.form.get("token", "").strip())
        if role is None:
            return flask.render_template("login.html", next=target, wrong=True), 401
        response = flask.make_response(flask.redirect(target, 303))
        access.log_in(response, role)
        return response

    @web.post("/logout")
    def log_out() -> ResponseReturnValue:
        response = flask.make_response(flask.redirect("/login", 303))
        access.log_out(response)
        return response

    return web


def _own_path(target: str) -> str:
    """Return `target` if it is a path of this service, else "/": the login must not forward to another site."""
    return target if target.startswith("/") and not target.startswith(("//", "/\\")) and target.isprintable() else "/"
