"""The hub's web application, and `serve`, which runs it with the controller of training beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import flask
import sqlalchemy as sa
from flask.typing import ResponseReturnValue

from millpond import MillpondError, web
from millpond.files import lock
from millpond.hub import console, controller, feedback_api, registry_api, review, training_api
from millpond.hub.db import is_full, migrate
from millpond.hub.state import Hub
from millpond.registry import RegistryError
from millpond.settings import HubSettings, RegistrySettings

WORKERS = 1
THREADS = 24
LOCK_WAIT_S = 5.0
"""How long to wait for a hub that is ending; one that was killed is gone at once."""


class SecondHub(MillpondError):
    """Another hub works on this state already."""


def create_app(settings: HubSettings, registry: RegistrySettings) -> flask.Flask:
    """Return the application; the database must have been migrated."""
    from millpond.hub.metrics import HubCollector
    from millpond.web.metrics import add_metrics  # see there: not before the worker's environment is set

    hub = Hub.open(settings, registry)
    access = web.Access("hub", tokens_of(settings))
    app = web.create_app("millpond.hub", access=access, max_request_bytes=settings.max_request_bytes)
    app.extensions["millpond.hub"] = hub
    for part in (registry_api, feedback_api, review, training_api, console):
        app.register_blueprint(part.blueprint(hub, access))

    @app.get("/readyz")
    @web.documented(open=True, errors={503: "Not ready, and why."})
    def readyz() -> ResponseReturnValue:
        """Say whether the database and the registry can be used."""
        with hub.database.read() as connection:
            connection.execute(sa.text("SELECT 1"))
        hub.tags()
        return web.json_response({"status": "ready"})

    @app.errorhandler(sa.exc.SQLAlchemyError)
    def database_error(error: sa.exc.SQLAlchemyError) -> ResponseReturnValue:
        app.logger.error("%s %s: %s", flask.request.method, flask.request.path, error)
        if is_full(error):
            message, next = (
                "The hub's disk is full; nothing of this request was stored.",
                "Make room, and send it again.",
            )
            return app.handle_user_exception(web.ApiError(507, "disk_full", message, next))
        message, next = "The hub's database cannot be used right now.", "Try again; the hub's log says more."
        headers = {"Retry-After": "1"}
        return app.handle_user_exception(web.ApiError(503, "database_unavailable", message, next, headers))

    @app.errorhandler(RegistryError)
    def registry_error(error: RegistryError) -> ResponseReturnValue:
        app.logger.error("%s %s: %s", flask.request.method, flask.request.path, error)
        next = "The hub's log says more; `millpond registry list` shows what can be read."
        return app.handle_user_exception(web.ApiError(503, "registry_unavailable", str(error), next))

    add_metrics(app, access, "edge", [HubCollector(hub)])
    web.add_openapi(app, "Millpond hub")
    return app


def tokens_of(settings: HubSettings) -> dict[str, str]:
    """Return role → token, the lowest role first."""
    return {
        "edge": settings.edge_token,
        "reviewer": settings.reviewer_token,
        "operator": settings.operator_token,
    }


def serve(settings: HubSettings, registry: RegistrySettings) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        SecondHub: another hub works below the same home.
        DatabaseError: the database cannot be used.
        ServeError, SettingsError: it cannot listen there.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with _alone(settings):
        hub = Hub.open(settings, registry)
        migrate(hub.database)
        hub.database.close()
        for line in _warnings(hub):
            print(f"millpond hub: {line}", flush=True)  # noqa: T201
        web.serve(
            lambda: create_app(settings, registry),
            program="hub",
            bind=settings.bind,
            port=settings.port,
            tokens={f"{role}_token": token for role, token in tokens_of(settings).items()},
            workers=WORKERS,
            threads=THREADS,
            metrics_dir=settings.home / "hub/metrics",
            companions={"controller": lambda: controller.run(settings, registry)},
        )


def _warnings(hub: Hub) -> Iterator[str]:
    tokens = tokens_of(hub.settings)
    missing = [role for role, token in tokens.items() if not token]
    if len(missing) == len(tokens):
        yield "no token is set, so everybody on this machine may do everything."
    elif missing:
        variables = ", ".join(f"MILLPOND_HUB_{role.upper()}_TOKEN" for role in missing)
        yield f"{variables} not set: nobody has that role, or only those of a higher one do."
    if why := hub.why_no_training():
        yield f"it cannot train. {why}"


@contextmanager
def _alone(settings: HubSettings) -> Iterator[None]:
    """Hold the lock of a hub's state; forked workers hold it too, so it is free when the last of them is gone."""
    place = settings.home / "hub"
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = (place / "lock").open("w")
    except OSError as error:
        raise SecondHub(f"{place} cannot be written: {error}. Set MILLPOND_HOME to a place that can.") from error
    with file:
        try:
            lock(file, LOCK_WAIT_S)
        except BlockingIOError:
            raise SecondHub(
                f"Another hub works on {place}, and two would train the same models twice. "
                "Stop it, or give this one another MILLPOND_HOME."
            ) from None
        yield
