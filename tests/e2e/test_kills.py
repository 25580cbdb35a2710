"""Kill -9 edge, hub and pool at random points of the loop's traffic: it goes on, nothing is lost, nothing doubled."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from millpond.demo.corpus import DemoCorpus
from millpond.demo.loop import Loop
from millpond.demo.services import Service, Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLS = 60
PAUSES_S = (0.05, 0.6)


def kill_at_random(services: list[Service], kills: int, dice: random.Random, work: Future[None]) -> Counter[str]:
    """Kill and start again, `kills` times, while `work` goes on; then leave all of them up."""
    killed: Counter[str] = Counter()
    while killed.total() < kills and not work.done():
        time.sleep(dice.uniform(*PAUSES_S))
        victim = dice.choice(services)
        victim.kill()
        victim.start()  # from this thread: the kernel ends a service with the thread that started it
        if dice.random() < 0.7:  # sometimes the next one falls while this one is still starting
            victim.wait_ready()
        killed[victim.name] += 1
    for service in services:
        service.wait_ready()
    return killed


@pytest.fixture
def loop(tmp_path: Path, small_corpus: DemoCorpus) -> Iterator[Loop]:
    with (
        Site(tmp_path / "site", recipe=small_corpus.recipe, retrain_after=1) as site,
        Loop(site, small_corpus, Console(quiet=True), {}) as loop,
    ):
        yield loop


def test_no_accepted_correction_is_lost_or_doubled_over_many_kills(loop: Loop) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    dice = random.Random(seed)
    site = loop.site
    loop.hub.start_training()
    first = loop.wait_promotion(after=0)
    loop.wait_served(first["version"])

    sent: dict[str, tuple[str, str]] = {}
    enough = threading.Event()

    def traffic() -> None:
        for batch in itertools.cycle(
            [loop.corpus.traffic[start : start + 5] for start in range(0, len(loop.corpus.traffic), 5)]
        ):
            if enough.is_set():
                return
            predictions = loop.edge.predict([row.text for row in batch])
            for row, prediction in zip(batch, predictions, strict=True):
                assert prediction["label"] in ("bad", "good")
                if prediction["label"] != row.label:
                    sent[loop.edge.correct(prediction["id"], row.label)] = (row.text, row.label)

    with ThreadPoolExecutor(1) as user:
        work = user.submit(traffic)
        killed = kill_at_random([site.edge, site.hub, site.pool], KILLS, dice, work)
        enough.set()
        work.result(timeout=120)
    assert killed.total() >= KILLS
    assert len(sent) > 20
    assert loop.edge.model()["serving"]["digest"] == first["digest"]

    loop.wait_pending(len(sent))
    stored = [(row["id"], row["text"], row["label"]) for row in loop.hub.corrections("pending")]
    assert Counter(identifier for identifier, _, _ in stored) == Counter(sent.keys())
    assert {identifier: (text, label) for identifier, text, label in stored} == sent


def test_retraining_comes_to_its_end_although_pool_and_hub_are_killed_in_it(loop: Loop) -> None:
    site = loop.site
    loop.hub.start_training()
    first = loop.wait_promotion(after=0)
    loop.wait_served(first["version"])
    loop.send_corrections(loop.send_traffic())
    loop.wait_pending(1)

    pending = [row["id"] for row in loop.hub.corrections("pending")]
    loop.hub.accept("test", pending)
    kill_at_random([site.pool, site.hub], 4, random.Random(7), Future())
    second = loop.wait_promotion(after=1)
    loop.wait_served(second["version"] if second["promoted"] else first["version"])
    assert len({record["version"] for record in loop.hub.promotions()}) == len(loop.hub.promotions())


def test_stopping_the_site_leaves_no_process(loop: Loop) -> None:
    children = psutil.Process().children(recursive=True)
    assert children
    loop.site.stop()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
