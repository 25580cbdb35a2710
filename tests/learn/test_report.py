"""The report of a run: complete, self-contained, and safe whatever the texts and labels hold."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from millpond.learn.evaluate import wilson
from millpond.learn.recipes import read_recipe
from millpond.learn.report import write_report
from millpond.learn.run import Run, run
from millpond.settings import LearnSettings

from .conftest import make_rows, write_jsonl

EVIL = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>"


def trained(tmp_path: Path, rows: list[tuple[str, str]], **changes: object) -> Run:
    tmp_path.mkdir(exist_ok=True)
    write_jsonl(tmp_path / "d.jsonl", rows)
    model = {"options": {"buckets": 1024, "min_count": 1}}
    recipe = read_recipe(None, {"data": {"file": str(tmp_path / "d.jsonl")}, "model": model} | changes)
    settings = LearnSettings(home=tmp_path, threads=1)
    return run(recipe, settings, device="cpu", name="demo", out=tmp_path / "run", report=lambda at: None)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with hostile texts whose labels are drawn by lot, so that there are mistakes on them."""
    lots = random.Random(3)
    rows = [
        (f"{text} {EVIL}", lots.choice(["negative", "positive"])) if lots.random() < 0.2 else (text, label)
        for text, label in make_rows(500)
    ]
    return trained(tmp_path_factory.mktemp("report"), rows, validation=0.2, training={"epochs": 4})


class Page(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words += f"{data} "


def test_the_report_says_all_that_a_reader_asks(done: Run) -> None:
    html = (done.directory / "report.html").read_text()
    words = " ".join(Page(html).words.split())
    for heading in ("Training", "Confusion", "Accuracy by length", "By source", "Calibration", "worst mistakes"):
        assert heading in words
    for heading in ("Speed", "Lineage", "Options"):
        assert heading in words
    scaling = done.scaling
    assert scaling is not None
    for fact in (
        f"{done.evaluation.accuracy:.2%}",
        f"{scaling.temperature:.3f}",
        f"{scaling.calibration_error:.4f}",
        done.dataset.digest,
        "training.learning_rate 0.01",
        "model.options.buckets 1024",
        "model/model.onnx",
        done.evaluation.worst[0].text[:20],
    ):
        assert fact in words, fact


def test_the_report_needs_nothing_else_and_runs_nothing(done: Run) -> None:
    page = Page((done.directory / "report.html").read_text())
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert all(link.startswith(("#", "data:image/png;")) for link in page.links)
    assert "<script>alert(1)" in page.words  # as text
    assert any("<script>" in mistake.text for mistake in done.evaluation.worst)


def test_accuracy_by_source_is_a_table_where_there_are_several(tmp_path: Path) -> None:
    rows = make_rows(400)
    for number in range(4):
        write_jsonl(tmp_path / f"<b>{number}.jsonl", rows[number * 100 : number * 100 + 100 - 20 * number])
    done = trained(tmp_path / "run", rows, data={"file": str(tmp_path / "*.jsonl")}, training={"epochs": 1})
    words = " ".join(Page((done.directory / "report.html").read_text()).words.split())
    scores = done.evaluation.by_source
    assert {score.name for score in scores} == {f"<b>{number}.jsonl" for number in range(4)}
    assert sum(score.rows for score in scores) == done.evaluation.rows
    assert sum(score.rows * score.accuracy for score in scores) == pytest.approx(
        done.evaluation.rows * done.evaluation.accuracy
    )
    for score in scores:
        low, high = wilson(score.accuracy, score.rows)
        assert f"{score.name} {score.rows} {score.accuracy:.2%} {low:.2%} to {high:.2%}" in words
    metrics = json.loads((done.directory / "metrics.json").read_text())
    assert metrics["test"]["by_source"][0]["name"] == scores[0].name


def test_where_there_is_one_source_the_report_says_so(done: Run) -> None:
    words = " ".join(Page((done.directory / "report.html").read_text()).words.split())
    assert "All test rows are from one source, d.jsonl." in words


def test_its_pictures_are_drawings_with_letters(done: Run) -> None:
    html = (done.directory / "report.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(drawings) == 4
    for drawing in drawings:
        assert "<text" in drawing
        ElementTree.fromstring(drawing.replace("xlink:", ""))
    ids = re.findall(r'id="([^"]+)"', html)
    assert len(html) < 400_000
    assert ids


@pytest.mark.parametrize(("done_epochs", "shown"), [(30, 30), (31, 17), (1000, 32)])
def test_of_many_epochs_some_are_shown(done: Run, tmp_path: Path, done_epochs: int, shown: int) -> None:
    """The first, the best and the last among them."""
    training = done.trained.training
    epochs = [replace(training.epochs[0], epoch=epoch) for epoch in range(1, done_epochs + 1)]
    many = replace(training, epochs=epochs, best=done_epochs - 1)
    write_report(replace(done, trained=replace(done.trained, training=many)), tmp_path / "r.html")
    table = (tmp_path / "r.html").read_text().partition("<h2>Training</h2>")[2].partition("</table>")[0]
    numbers = [int(number) for number in re.findall(r'<tr[^>]*><td class="number">(\d+)</td>', table)]
    assert {1, done_epochs - 1, done_epochs} <= set(numbers)
    assert len(numbers) == shown
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("ended", "says"),
    [("diverged", "Training ended early: too large."), ("interrupted", "interrupted"), ("early", "did not get better")],
)
def test_a_training_that_ended_early_says_so(done: Run, tmp_path: Path, ended: str, says: str) -> None:
    training = replace(done.trained.training, ended=ended, error="too large.")
    write_report(replace(done, trained=replace(done.trained, training=training)), tmp_path / "r.html")
    assert says in Page((tmp_path / "r.html").read_text()).words


def test_labels_that_look_like_formulas_are_drawn_as_they_are(tmp_path: Path) -> None:
    labels = ("$\\frac$", "\x1b[1m" + "a" * 30)
    rows = [(f"word{i % 2} and filler {i}", labels[i % 2]) for i in range(100)]
    html = (trained(tmp_path, rows, training={"epochs": 1}).directory / "report.html").read_text()
    assert html.count("$·frac$") == 2  # the backslash alone is not drawn
    assert html.count("··1maaaaaaaaaaaaa…") == 2


def test_a_run_without_validation_and_with_many_labels_has_a_report(tmp_path: Path) -> None:
    rows = [(f"word{i % 60} and filler {i}", f"a label with a long name, number {i % 60}") for i in range(600)]
    done = trained(tmp_path, rows, validation=0.0, training={"epochs": 0})
    words = Page((done.directory / "report.html").read_text()).words
    assert done.scaling is None
    assert "nothing to fit a temperature on" in words
    assert "No epoch was finished" in words
    assert "and 10 more: see metrics.json" in words
