"""`/openapi.json`, made from the views themselves: what `documented` says of them and their msgspec types."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import flask
import msgspec

from millpond import __version__
from millpond.web.errors import ErrorAnswer
from millpond.web.json import json_response

F = TypeVar("F", bound=Callable[..., Any])
_NOTE = "__millpond_documented__"


@dataclass(frozen=True)
class _Note:
    body: Any
    answers: tuple[Any, ...]
    status: int
    errors: Mapping[int, str]
    open: bool


def documented(
    *,
    body: Any = None,
    answer: Any = (),
    status: int = 200,
    errors: Mapping[int, str] | None = None,
    open: bool = False,
) -> Callable[[F], F]:
    """Describe a view for `/openapi.json`; its docstring's first line is the summary.

    `body` and `answer` are msgspec types (a tuple: one of several answers), `errors` maps further statuses to their
    reasons, `open` says that it needs no token.
    """
    note = _Note(body, answer if isinstance(answer, tuple) else (answer,), status, errors or {}, open)

    def decorate(view: F) -> F:
        setattr(view, _NOTE, note)
        return view

    return decorate


def add_openapi(app: flask.Flask, title: str) -> None:
    """Serve `/openapi.json` for all documented views of `app`; call it after the last one is registered."""
    body = describe(app, title)
    app.add_url_rule("/openapi.json", "openapi", lambda: json_response(body))


def describe(app: flask.Flask, title: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 description of all documented views of `app`."""
    views = [(rule, getattr(app.view_functions[rule.endpoint], _NOTE, None)) for rule in app.url_map.iter_rules()]
    noted = [(rule, note) for rule, note in views if isinstance(note, _Note)]
    types = dict.fromkeys([ErrorAnswer, *(kind for _, note in noted for kind in (*note.answers, note.body) if kind)])
    schemas, components = msgspec.json.schema_components(list(types), ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for rule, note in noted:
        path = re.sub(r"<(?:[^:<>]+:)?([^<>]+)>", r"{\1}", rule.rule)
        summary = (app.view_functions[rule.endpoint].__doc__ or "").strip().partition("\n")[0]
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            operation = {"operationId": rule.endpoint, "summary": summary} | _operation(note, rule.arguments, schema_of)
            paths.setdefault(path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": components, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(note: _Note, arguments: set[str], schema_of: dict[Any, Any]) -> dict[str, Any]:
    success: dict[str, Any] = {"description": "Success"}
    if note.answers:
        answers = [schema_of[kind] for kind in note.answers]
        success |= _json(answers[0] if len(answers) == 1 else {"oneOf": answers})
    responses = {str(note.status): success}
    responses |= {
        str(status): {"description": why} | _json(schema_of[ErrorAnswer]) for status, why in note.errors.items()
    }
    operation: dict[str, Any] = {"responses": responses, "security": [] if note.open else [{"token": []}]}
    if arguments:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in sorted(arguments)
        ]
    if note.body:
        operation["requestBody"] = {"required": True} | _json(schema_of[note.body])
    return operation


def _json(schema: Any) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}
