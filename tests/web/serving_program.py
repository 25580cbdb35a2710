"""A program that `test_serving.py` starts: PORT WORKERS DIRECTORY [BIND]."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import flask
from flask.typing import ResponseReturnValue

from millpond import MillpondError
from millpond.web import Access, create_app, json_response, serve

PORT, WORKERS, DIRECTORY = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
BIND = sys.argv[4] if len(sys.argv) > 4 else "127.0.0.1"


def factory() -> flask.Flask:
    from millpond.web.metrics import add_metrics

    if (DIRECTORY / "fail").exists():
        raise RuntimeError("this worker cannot start")
    access = Access("edge", {"caller": ""})
    app = create_app("millpond.web", access=access, max_request_bytes=10_000)

    @app.get("/pid")
    def pid() -> ResponseReturnValue:
        return json_response(os.getpid())

    @app.get("/slow")
    def slow() -> ResponseReturnValue:
        (DIRECTORY / "slow-began").touch()
        time.sleep(1.0)
        return json_response("done")

    @app.post("/echo")
    def echo() -> ResponseReturnValue:
        return json_response(len(flask.request.get_data()))

    add_metrics(app, access, "caller")
    return app


def companion() -> None:
    (DIRECTORY / "companion").write_text(str(os.getpid()))
    while True:
        time.sleep(60)


try:
    serve(
        factory, program="edge", bind=BIND, port=PORT, tokens={"token": ""}, workers=WORKERS, threads=4,
        metrics_dir=DIRECTORY / "metrics", companions={"sync": companion},
    )  # fmt: skip
except MillpondError as error:
    print(f"error: {error}")
    sys.exit(2)
(DIRECTORY / "ended-well").touch()
