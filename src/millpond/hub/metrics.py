"""The hub's state for Prometheus, read from database and registry when it is asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from millpond.hub import corrections, edges, jobs, promotions
from millpond.hub.state import Hub


class HubCollector(Collector):
    """Corrections and jobs by state, promotions, the champion, and each edge's silence and outbox."""

    def __init__(self, hub: Hub):
        self.hub = hub

    def collect(self) -> Iterator[GaugeMetricFamily | InfoMetricFamily]:
        """Yield the metrics."""
        database = self.hub.database
        yield _by("millpond_hub_corrections", "Corrections.", "state", corrections.count_states(database))
        yield _by("millpond_hub_jobs", "Training jobs.", "state", jobs.count_states(database))
        yield _by("millpond_hub_promotions", "Decisions on candidates.", "outcome", promotions.count_outcomes(database))
        known = edges.listed(database, time.time())
        silent = {edge.name: edge.silent_s for edge in known}
        yield _by("millpond_hub_edge_silent_seconds", "Seconds since an edge's newest report.", "edge", silent)
        waiting = {edge.name: edge.report.outbox for edge in known}
        yield _by("millpond_hub_edge_outbox", "Corrections that wait at an edge.", "edge", waiting)
        if champion := self.hub.champion_ref():
            named = {"name": champion.name, "version": champion.version, "digest": champion.digest}
            yield InfoMetricFamily("millpond_hub_champion", "The model that edges follow.", named)


def _by(name: str, help: str, label: str, values: dict[str, int] | dict[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
