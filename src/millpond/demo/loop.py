"""The whole loop, once, on one machine: train, serve, correct, review, retrain, promote, serve the better model.

Everything goes through the interfaces that people and machines use: the processes of `services`, HTTP, the pool.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from millpond import MillpondError
from millpond.demo.clients import Client, EdgeClient, HubClient, RequestRefused
from millpond.demo.corpus import DemoCorpus
from millpond.demo.services import Site
from millpond.demo.summary import Corrections, MeasuredModel, Summary

TRAINING_S = 900.0
"""How long one training job may take."""
DELIVERY_S = 60.0
"""How long a model or a correction may be on its way between hub and edge."""
TEXTS_PER_REQUEST = 50
CALLERS = 4
REVIEWER = "rule:demo"


class LoopStuck(MillpondError):
    """A step of the loop did not come to its end in time."""


class Loop:
    """One run of the loop over a site that is up; `seconds` fills as stages end. Closes its connections on leaving."""

    def __init__(self, site: Site, corpus: DemoCorpus, console: Console, seconds: dict[str, float]):
        self.site = site
        self.corpus = corpus
        self.console = console
        self.seconds = seconds
        self.edge = EdgeClient(site.edge_url)
        self.hub = HubClient(site.hub_url, site.tokens["operator"])
        self.after_stage: Callable[[str], None] = lambda stage: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.edge.close()
        self.hub.close()

    def run(self) -> Summary:
        """Run all stages and return what was found.

        Raises:
            LoopStuck: a stage took longer than its limit.
            RequestRefused: a service refused a request.
        """
        with self.stage("train_v1", "the hub trains v1, through a lease on the pool"):
            self.hub.start_training()
            first = self.wait_promotion(after=0)
        with self.stage("deliver_v1", "the edge pulls v1, checks signature and golden answers, serves it"):
            self.wait_served(first["version"])
        with self.stage("traffic", f"{len(self.corpus.traffic):,} reviews go to the edge"):
            wrong = self.send_traffic()
        with self.stage("correct", f"the true label goes back where the edge was wrong: {len(wrong):,} times"):
            sent = self.send_corrections(wrong)
            self.wait_pending(len(sent))
        with self.stage("review", "a rule accepts them, in the reviewer's place"):
            pending = [correction["id"] for correction in self.hub.corrections("pending")]
            self.hub.accept(REVIEWER, pending)
        with self.stage("train_v2", "the hub has enough corrections: it trains v2 by itself, measures, decides"):
            second = self.wait_promotion(after=1)
        with (
            self.stage("deliver_v2", "the edge takes the winner while requests go on"),
            Pulse(self.site.edge_url) as pulse,
        ):
            expected = second["version"] if second["promoted"] else first["version"]
            self.wait_served(expected)
        served = self.edge.model()["serving"]["version"]
        return self.summarize(first, second, sent=len(sent), failed=pulse.failed, served=served)

    @contextmanager
    def stage(self, name: str, saying: str) -> Iterator[None]:
        """Say what happens, and keep how long it took."""
        self.console.print(f"[bold]{saying}[/]")
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 2)
        self.after_stage(name)

    def wait_promotion(self, after: int) -> dict[str, Any]:
        """Wait until the hub has decided on more than `after` candidates; return the newest decision."""
        newest: list[dict[str, Any]] = []

        def decided(progress: Progress, bar: TaskID) -> bool:
            jobs = self.hub.jobs()
            if len(jobs) > after:
                _show_job(jobs[0], progress, bar)
                if jobs[0]["state"] == "failed":
                    raise LoopStuck(
                        f"Training failed: {jobs[0].get('error')}. The job's log is in the hub's pages, "
                        f"{self.site.hub_url}, and below {self.site.training_home}."
                    )
            newest[:] = self.hub.promotions()
            return len(newest) > after

        self.wait("a promotion record", TRAINING_S, decided)
        return newest[0]

    def wait_served(self, version: str) -> None:
        """Wait until the edge serves `version`."""

        def served(progress: Progress, bar: TaskID) -> bool:
            model = self.edge.model()
            if refused := model.get("refused"):
                raise LoopStuck(f"The edge refused {refused['version']}: {refused['reason']}")
            return bool((model.get("serving") or {}).get("version") == version)

        self.wait(f"the edge to serve {version}", DELIVERY_S, served)

    def wait_pending(self, expected: int) -> None:
        """Wait until the hub holds `expected` corrections to review."""

        def arrived(progress: Progress, bar: TaskID) -> bool:
            pending = self.hub.counts().get("pending", 0)
            progress.update(bar, completed=pending, total=expected)
            return pending >= expected

        self.wait("the corrections to reach the hub", DELIVERY_S, arrived)

    def send_traffic(self) -> list[tuple[str, str]]:
        """Send the traffic; return (prediction id, true label) of each wrong answer."""
        rows = self.corpus.traffic
        batches = [rows[start : start + TEXTS_PER_REQUEST] for start in range(0, len(rows), TEXTS_PER_REQUEST)]
        wrong: list[tuple[str, str]] = []
        with self.progress("reviews", len(rows)) as (progress, bar), ThreadPoolExecutor(CALLERS) as callers:
            for batch, predictions in zip(
                batches, callers.map(lambda batch: self.edge.predict([row.text for row in batch]), batches), strict=True
            ):
                wrong += [
                    (prediction["id"], row.label)
                    for row, prediction in zip(batch, predictions, strict=True)
                    if prediction["label"] != row.label
                ]
                progress.advance(bar, len(batch))
        return wrong

    def send_corrections(self, wrong: list[tuple[str, str]]) -> list[str]:
        """Tell the edge the right labels; return the ids of the corrections."""
        with self.progress("corrections", len(wrong)) as (progress, bar), ThreadPoolExecutor(CALLERS) as callers:
            sent = []
            for correction_id in callers.map(lambda pair: self.edge.correct(*pair), wrong):
                sent.append(correction_id)
                progress.advance(bar)
        return sent

    def wait(self, what: str, timeout_s: float, is_done: Callable[[Progress, TaskID], bool]) -> None:
        """Poll until `is_done`; show progress meanwhile."""
        deadline = time.monotonic() + timeout_s
        with self.progress(what, None) as (progress, bar):
            while not is_done(progress, bar):
                if time.monotonic() > deadline:
                    raise LoopStuck(
                        f"Waited {timeout_s:.0f} s in vain for {what}. The services' logs are in {self.site.logs}."
                    )
                time.sleep(0.1)

    @contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[tuple[Progress, TaskID]]:
        """Show a bar that leaves nothing behind."""
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        quiet = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=quiet) as progress:
            yield progress, progress.add_task(what, total=total)

    def summarize(
        self, first: dict[str, Any], second: dict[str, Any], *, sent: int, failed: int, served: str
    ) -> Summary:
        """Gather the figures from the hub's records."""
        counts = self.hub.counts()
        v2_accuracy = second["test"]["candidate_accuracy"]
        target = self.corpus.target
        return Summary(
            corpus=self.corpus.name,
            corpus_why=self.corpus.why,
            official_test=self.corpus.official_test,
            rows={
                "train": self.corpus.train_rows,
                "traffic": len(self.corpus.traffic),
                "test": second["test"]["rows"],
            },
            v1=MeasuredModel(
                version=first["version"],
                test_accuracy=second["test"]["champion_accuracy"],
                corrections_accuracy=second["heldout"]["champion_accuracy"] or 0.0,
            ),
            v2=MeasuredModel(
                version=second["version"],
                test_accuracy=v2_accuracy,
                corrections_accuracy=second["heldout"]["candidate_accuracy"] or 0.0,
            ),
            promoted=second["promoted"],
            reasons=second["reasons"],
            served=served,
            target=target,
            target_reached=v2_accuracy >= target if target is not None and self.corpus.official_test else None,
            corrections=Corrections(sent=sent, accepted=counts.get("accepted", 0), held_out=second["heldout"]["rows"]),
            failed_requests=failed,
            seconds=self.seconds,
        )


class Pulse:
    """A user who asks the edge all the time; counts what failed. Never asks twice for the same answer."""

    def __init__(self, url: str):
        self.asked = 0
        self.failed = 0
        self._client = Client(url)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="pulse")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self._client.close()

    def _ask(self) -> None:
        while not self._done.wait(0.01):
            self.asked += 1
            try:
                self._client.request("POST", "/v1/predict", {"text": "A quiet film that stays."}, patience_s=0.0)
            except RequestRefused:
                self.failed += 1


def _show_job(job: dict[str, Any], progress: Progress, bar: TaskID) -> None:
    state = job.get("progress") or {}
    parts = [job["state"], state.get("stage", "")]
    if state.get("loss") is not None:
        parts.append(f"loss {state['loss']:.3f}")
    if state.get("accuracy") is not None:
        parts.append(f"accuracy {state['accuracy']:.3f}")
    progress.update(
        bar,
        description=" ".join(part for part in parts if part),
        completed=state.get("done", 0),
        total=state.get("total") or None,
    )
