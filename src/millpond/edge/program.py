"""`millpond edge serve`: web workers, and the sync process beside them."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from typing import TYPE_CHECKING

from millpond import MillpondError
from millpond.edge.models import ModelShelf
from millpond.edge.outbox import Outbox
from millpond.edge.predictions import PredictionLog
from millpond.edge.state import EdgeFiles
from millpond.settings import EdgeSettings
from millpond.web import serve

if TYPE_CHECKING:
    import flask

WEB_THREADS = 8
"""Requests that one worker handles at a time; idle connections cost none."""


class EdgeUnusable(MillpondError):
    """The edge cannot keep its files where it is told to."""


def serve_edge(settings: EdgeSettings) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        SettingsError, ServeError, EdgeBusy, EdgeUnusable: it cannot start like this; nothing was changed.
    """
    files = EdgeFiles(settings.home)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.owned())
            ModelShelf(files.models)
            PredictionLog.clear_if_damaged(files.predictions)
            Outbox(files.outbox, settings.max_outbox).close()
        except (OSError, sqlite3.Error) as error:
            raise EdgeUnusable(
                f"{files.root} cannot be used: {error}. Make it writable, make room, or set MILLPOND_HOME. If "
                f"{files.outbox.name} is damaged, keep it (corrections may be in it) and move it away."
            ) from error
        serve(
            functools.partial(_create, settings),
            program="edge",
            bind=settings.bind,
            port=settings.port,
            tokens={"token": settings.token},
            workers=settings.workers,
            threads=WEB_THREADS,
            metrics_dir=files.metrics,
            companions={"sync": functools.partial(_sync, settings)} if settings.hub else {},
        )


# Imported in the processes that need them: the master stays small, and forks nothing that was loaded before.


def _create(settings: EdgeSettings) -> flask.Flask:
    from millpond.edge.app import create_edge

    return create_edge(settings)


def _sync(settings: EdgeSettings) -> None:
    from millpond.edge.sync import run_sync

    run_sync(settings)
