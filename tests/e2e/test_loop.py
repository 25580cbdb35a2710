"""The whole loop, over real processes, with a small corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from millpond.demo.corpus import DemoCorpus
from millpond.demo.loop import Loop
from millpond.demo.services import Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_correction_becomes_a_better_model_at_the_edge(tmp_path: Path, small_corpus: DemoCorpus) -> None:
    seconds: dict[str, float] = {}
    with Site(tmp_path / "site", recipe=small_corpus.recipe, retrain_after=1) as site:
        with Loop(site, small_corpus, Console(quiet=True), seconds) as loop:
            summary = loop.run()
        tokens = list(site.tokens.values())
    assert summary.promoted, summary.reasons
    assert summary.served == summary.v2.version == "v2"
    assert summary.v2.corrections_accuracy > summary.v1.corrections_accuracy
    assert summary.corrections.sent == summary.corrections.accepted > 0
    assert summary.failed_requests == 0
    assert json.loads(summary.as_json())["seconds"].keys() >= {"train_v1", "traffic", "train_v2", "deliver_v2"}
    for log in (tmp_path / "site/logs").iterdir():
        written = log.read_text()
        assert "Traceback" not in written, log.name
        assert not any(token in written for token in tokens), f"{log.name} holds a secret"
