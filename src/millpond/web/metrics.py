"""Requests counted and timed for Prometheus, over all worker processes, and `/metrics`.

prometheus-client decides at import whether counters live in shared files (`PROMETHEUS_MULTIPROC_DIR`, which
`serve` sets), so import this module in the application's factory, never at the top of what `serve` itself imports.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import flask
from flask.typing import ResponseReturnValue
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest, multiprocess
from prometheus_client.registry import REGISTRY, Collector

from millpond.web.access import Access

REQUESTS = Counter("millpond_http_requests", "Requests answered.", ["program", "method", "route", "status"])
SECONDS = Histogram(
    "millpond_http_request_seconds",
    "Seconds from a request's arrival to its answer.",
    ["program", "route"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)


def add_metrics(app: flask.Flask, access: Access, role: str, collectors: Iterable[Collector] = ()) -> None:
    """Measure all requests of `app` and serve `/metrics` to `role`; `collectors` add what they find when asked."""
    state = list(collectors)

    @app.before_request
    def start() -> None:
        flask.g.started = time.perf_counter()

    @app.after_request
    def count(response: flask.Response) -> flask.Response:
        # the rule, not the path: a caller must not be able to make up time series
        route = flask.request.url_rule.rule if flask.request.url_rule else "(none)"
        method = flask.request.method if flask.request.url_rule else "(any)"
        REQUESTS.labels(access.program, method, route, str(response.status_code)).inc()
        if "started" in flask.g:
            SECONDS.labels(access.program, route).observe(time.perf_counter() - flask.g.started)
        return response

    @app.get("/metrics")
    @access.required(role)
    def metrics() -> ResponseReturnValue:
        """Return the metrics in the text format of Prometheus."""
        registry = REGISTRY
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        own = CollectorRegistry()
        for collector in state:
            own.register(collector)
        return flask.Response(generate_latest(registry) + generate_latest(own), content_type=CONTENT_TYPE_LATEST)
