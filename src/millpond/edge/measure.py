"""What the edge tells Prometheus: counters of the web workers, and the state that lies on disk."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from millpond.edge.engine import LiveEngine
from millpond.edge.models import ModelShelf
from millpond.edge.outbox import Outbox
from millpond.edge.state import read_state

PREDICTIONS = Counter("millpond_edge_predictions", "Texts classified.", ["version", "label"])
NOT_KEPT = Counter("millpond_edge_predictions_not_kept", "Predictions that feedback cannot name: the disk failed.")
INFERENCE_SECONDS = Histogram(
    "millpond_edge_inference_seconds",
    "Seconds in the engine for one request.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)


class EdgeCollector(Collector):
    """What is on disk, read when Prometheus asks: right after a restart too, and the same from every worker."""

    def __init__(self, live: LiveEngine, shelf: ModelShelf, outbox: Outbox, sync: Path) -> None:
        self._live = live
        self._shelf = shelf
        self._outbox = outbox
        self._sync = sync

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        state = read_state(self._sync)
        model = GaugeMetricFamily("millpond_edge_model_info", "The served model.", labels=["name", "version", "digest"])
        if engine := self._live.engine:
            model.add_metric([engine.ref.name, engine.ref.version, engine.ref.digest], 1)
        yield model
        refused = CounterMetricFamily("millpond_edge_model_refused", "Models refused.", labels=["reason"])
        for code, count in state.refused.items():
            refused.add_metric([code], count)
        yield refused
        taken_in, waiting, set_aside = (
            self._outbox.total(),
            self._outbox.count("waiting"),
            self._outbox.count("refused"),
        )
        yield CounterMetricFamily("millpond_edge_corrections", "Corrections taken in.", value=taken_in)
        yield GaugeMetricFamily("millpond_edge_outbox_waiting", "Corrections that wait for the hub.", value=waiting)
        yield GaugeMetricFamily("millpond_edge_outbox_set_aside", "Corrections that the hub refused.", value=set_aside)
        yield GaugeMetricFamily(
            "millpond_edge_sync_failing", "What sync fails at now (0: nothing).", value=len(state.errors)
        )
        if state.last_contact:
            yield GaugeMetricFamily(
                "millpond_edge_last_contact_timestamp_seconds",
                "When the hub last answered.",
                value=datetime.fromisoformat(state.last_contact).timestamp(),
            )
