"""The training job, as the hub starts it: a process that leaves a signed candidate and result.json, or neither."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from millpond.learn.datasets import Dataset, Split
from millpond.learn.job import JobError, _right, do_job, read_texts, training_rows
from millpond.learn.recipes import DataTable, Recipe
from millpond.registry import Store, generate_key_pair, parse_config, verify
from millpond.schema import JobProgress, JobResult
from millpond.settings import LearnSettings
from waiting import is_alive, wait_for

from .conftest import make_rows, write_jsonl

RECIPE = """
train_rows = 40
[data]
file = "train.jsonl"
test_file = "test.jsonl"
[model.options]
buckets = 4096
min_count = 1
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory with a recipe, its data and keys."""
    write_jsonl(tmp_path / "train.jsonl", make_rows(400))
    write_jsonl(tmp_path / "test.jsonl", make_rows(200, seed=1))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    generate_key_pair(tmp_path / "signing.key", tmp_path / "signing.pub")
    return tmp_path


def make_job(site: Path, name: str, **changes: Any) -> Path:
    directory = site / "jobs" / name
    directory.mkdir(parents=True)
    spec = {
        "id": name,
        "model": "sentiment",
        "version": name,
        "recipe": str(site / "recipe.toml"),
        "registry": str(site / "registry"),
        "private_key": str(site / "signing.key"),
    }
    (directory / "job.json").write_text(json.dumps(spec | changes))
    write_jsonl(directory / "corrections.jsonl", [])
    write_jsonl(directory / "heldout.jsonl", [])
    return directory


def result_of(directory: Path) -> JobResult:
    return msgspec.json.decode((directory / "result.json").read_bytes(), type=JobResult)


def run_job(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "millpond", "learn", "job", str(directory), "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


def test_two_jobs_leave_two_signed_models_and_compare_them(site: Path, tmp_path: Path) -> None:
    settings = LearnSettings(home=site / "home")
    v1 = do_job(make_job(site, "v1"), settings, device="cpu")
    assert v1 == result_of(site / "jobs/v1")
    assert (v1.test.rows, v1.test.both_right, v1.heldout.rows) == (200, 0, 0)
    assert not v1.official_test

    directory = make_job(site, "v2", champion=v1.digest)
    write_jsonl(directory / "corrections.jsonl", make_rows(200, seed=2))
    write_jsonl(directory / "heldout.jsonl", make_rows(60, seed=3))
    v2 = do_job(directory, settings, device="cpu")
    assert v2.test.champion_accuracy == pytest.approx(v1.test.candidate_accuracy)
    assert v2.test.candidate_accuracy > v1.test.candidate_accuracy
    assert v2.heldout.rows == 60
    assert v2.by_source == {"test.jsonl": v2.test, "corrections, held out": v2.heldout}
    assert set(v2.seconds) >= {"data", "encode", "train", "evaluate", "export", "register"}

    store = Store(site / "registry")
    assert store.tags("sentiment") == {"v1": v1.digest, "v2": v2.digest}
    model = store.checkout("sentiment", v2.digest, tmp_path / "out")
    verify(model, site / "signing.pub")
    config = parse_config((model / "config.json").read_bytes())
    assert (config.lineage.parent, config.lineage.corrections) == (v1.digest, 200)
    assert [source.role for source in config.data] == ["train", "test", "corrections", "heldout"]
    assert config.metrics["test_accuracy"] == pytest.approx(v2.test.candidate_accuracy)

    lines = (directory / "progress.jsonl").read_bytes().splitlines()
    stages = [msgspec.json.decode(line, type=JobProgress).stage for line in lines]
    assert list(dict.fromkeys(stages)) == ["data", "train", "evaluate", "export", "register"]
    left = {path.name for path in directory.iterdir()}
    assert left == {"job.json", "corrections.jsonl", "heldout.jsonl", "progress.jsonl", "result.json"}


@pytest.mark.slow
def test_the_same_job_in_another_process_gives_the_same_weights_and_answers(site: Path) -> None:
    digests = []
    for name in ("v1", "v2"):
        directory = make_job(site, name)
        done = run_job(directory)
        assert done.returncode == 0, done.stderr
        result = result_of(directory)
        assert result.digest in done.stdout
        manifest = json.loads(Store(site / "registry").manifest_bytes("sentiment", result.digest))
        digests.append([layer["digest"] for layer in manifest["layers"][:4]])
    assert digests[0] == digests[1]


def as_split(*rows: tuple[str, int]) -> Split:
    return Split([text for text, _ in rows], np.array([label for _, label in rows], np.int64))


def test_a_correction_whose_text_is_tested_on_or_held_out_does_not_train(small: Dataset) -> None:
    recipe = Recipe(data=DataTable(corpus="small"), correction_weight=2)
    tested, trained = small.test.texts[0], small.train.texts[0]
    flipped = 1 - int(small.train.labels[0])
    corrections = as_split((tested, 0), ("held", 1), ("new", 0), (trained, flipped), ("of no label", -1))
    heldout = as_split(("held", 1), (small.train.texts[1], 0))
    used, kept = training_rows(recipe, small, corrections, heldout)
    assert kept.texts == ["new", trained]
    assert used.texts.count("new") == 2
    assert tested not in used.texts
    assert "held" not in used.texts
    assert small.train.texts[1] not in used.texts
    assert used.labels[[text == trained for text in used.texts]].tolist() == [flipped, flipped]
    assert len(used) == 400 - 2 + 2 * 2


def test_corrections_among_the_training_rows_are_a_source_of_their_own(small: Dataset) -> None:
    corrections = Split(["new"], np.array([1]), source_names=("corrections",))
    used, _ = training_rows(Recipe(data=DataTable(file="x"), train_rows=5), small, corrections, as_split())
    assert [used.source_names[source] for source in used.sources] == ["small"] * 5 + ["corrections"]


def test_champion_and_corpus_are_compared_by_the_labels_names(site: Path, tmp_path: Path) -> None:
    v1 = do_job(make_job(site, "v1"), LearnSettings(home=site / "home"), device="cpu")
    champion = Store(site / "registry").checkout("sentiment", v1.digest, tmp_path / "out")
    cpu = torch.device("cpu")
    texts, labels = zip(*make_rows(50, seed=1), strict=True)
    truth = np.array([label == "positive" for label in labels], np.int64)
    right = _right(champion, Split(list(texts), truth), ["negative", "positive"], cpu)
    assert right.mean() > 0.7
    assert (_right(champion, Split(list(texts), 1 - truth), ["positive", "negative"], cpu) == right).all()
    assert not _right(champion, Split(list(texts), truth * 0 - 1), ["negative", "positive"], cpu).any()
    assert not _right(champion, Split(list(texts), truth), ["unheard", "of"], cpu).any()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"job.json": "{}"}, "is not a job"),
        ({"job.json": "x" * 70_000}, "larger than"),
        ({"corrections.jsonl": '{"text": "a"}\n'}, "line 1 is not a labelled text"),
        ({"corrections.jsonl": '{"text": "a", "label": "b"}\n{"text": 1, "label": "b"}\n'}, "line 2 is not"),
        ({"heldout.jsonl": "\udcff"}, "is not a labelled text"),
        ({"heldout.jsonl": None}, "cannot be read"),
        ({"job.json": None}, "is not a job"),
    ],
)
def test_a_job_with_damaged_files_leaves_no_result(site: Path, damage: dict[str, str | None], says: str) -> None:
    directory = make_job(site, "v1")
    for name, content in damage.items():
        if content is None:
            (directory / name).unlink()
        else:
            (directory / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(JobError, match=says):
        do_job(directory, LearnSettings(home=site / "home"), device="cpu")
    assert not (directory / "result.json").exists()
    assert Store(site / "registry").names() in ([], ())


def test_a_line_longer_than_any_correction_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "' + b"a" * (8 * 1024 * 1024) + b'", "label": "b"}\n')
    with pytest.raises(JobError, match="line 1 is longer than"):
        read_texts(tmp_path / "c.jsonl")


@pytest.mark.slow
def test_an_error_for_people_is_the_last_line_and_the_exit_is_2(site: Path) -> None:
    directory = make_job(site, "v1", recipe=str(site / "none.toml"))
    done = run_job(directory)
    assert done.returncode == 2
    assert "none.toml cannot be read" in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_that_is_ended_leaves_neither_model_nor_result(site: Path, sent: signal.Signals) -> None:
    text = (site / "recipe.toml").read_text()
    (site / "recipe.toml").write_text(text + "[training]\nepochs = 10000\n")
    directory = make_job(site, "v1")
    command = [sys.executable, "-m", "millpond", "learn", "job", str(directory), "--device", "cpu"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    progress = directory / "progress.jsonl"
    while not (progress.exists() and b'"train"' in progress.read_bytes()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started = time.monotonic()
    process.send_signal(sent)
    assert process.wait(10) == -sent
    assert time.monotonic() - started < 5
    assert not (directory / "result.json").exists()
    assert Store(site / "registry").names() in ([], ())


@pytest.mark.slow
def test_a_job_dies_with_the_process_that_started_it(site: Path) -> None:
    (site / "recipe.toml").write_text((site / "recipe.toml").read_text() + "[training]\nepochs = 10000\n")
    directory = make_job(site, "v1")
    code = "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(100)"
    command = [sys.executable, "-m", "millpond", "learn", "job", str(directory), "--device", "cpu"]
    parent = subprocess.Popen([sys.executable, "-c", code, *command], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    wait_for((directory / "progress.jsonl").exists, 60)
    parent.kill()
    parent.communicate()
    wait_for(lambda: not is_alive(pid), 60)
