"""Trainings that are killed and go on: by hand with --resume, and as the hub's job that is tried again."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from millpond.learn.checkpoint import CheckpointError, Checkpoints
from millpond.learn.job import do_job
from millpond.learn.recipes import read_recipe
from millpond.learn.run import Run, run
from millpond.registry import Store
from millpond.settings import LearnSettings

from .conftest import make_rows, write_jsonl
from .test_job import make_job, site  # noqa: F401

KILLS = 4


class Killed(BaseException):
    """In the place of a SIGKILL: nothing of ours handles it."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "reviews.jsonl", make_rows(500))


@pytest.fixture
def die_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that has the next training write a checkpoint before its nth step and end, as if killed."""
    real = Checkpoints.write
    left = [0]

    def is_due(checkpoints: Checkpoints) -> bool:
        left[0] -= 1
        return left[0] == 0

    def write(*arguments: Any) -> None:
        real(*arguments)
        raise Killed

    monkeypatch.setattr(Checkpoints, "is_due", is_due)
    monkeypatch.setattr(Checkpoints, "write", write)

    def set_left(count: int) -> None:
        left[0] = count

    return set_left


def train(data: Path, home: Path, out: Path | None, *, resume: bool = False, **changes: Any) -> Run:
    given = {"model": {"architecture": "ngram", "options": {"buckets": 1024, "min_count": 1}}, "validation": 0.1}
    recipe = read_recipe(None, {"data": {"file": str(data)}} | given | changes)
    settings = LearnSettings(home=home, threads=1)
    return run(recipe, settings, device="cpu", name="x", out=out, report=lambda at: None, resume=resume)


def weights(directory: Path) -> bytes:
    return (directory / "model/weights.safetensors").read_bytes()


def test_a_run_that_is_resumed_ends_as_an_unbroken_one_and_leaves_no_checkpoint(
    data: Path, tmp_path: Path, die_at: Callable[[int], None]
) -> None:
    whole = train(data, tmp_path, tmp_path / "whole")
    die_at(20)
    with pytest.raises(Killed):
        train(data, tmp_path, tmp_path / "run")
    resumed = train(data, tmp_path, tmp_path / "run", resume=True)
    assert resumed.trained.training.resumed is not None
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert resumed.evaluation == whole.evaluation
    assert not (tmp_path / "run/checkpoints").exists()
    with pytest.raises(CheckpointError, match="is finished"):
        train(data, tmp_path, tmp_path / "run", resume=True)


def test_resume_without_out_takes_the_newest_run_that_did_not_end(
    data: Path, tmp_path: Path, die_at: Callable[[int], None]
) -> None:
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(data, tmp_path, None, resume=True)
    die_at(5)
    with pytest.raises(Killed):
        train(data, tmp_path, None)
    (unfinished,) = (tmp_path / "runs").iterdir()
    done = train(data, tmp_path, None, resume=True)
    assert done.directory == unfinished
    assert done.trained.training.resumed == (1, 4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"training": {"epochs": 7}}, "training.epochs is 3 there and 7 here"),
        ({"data": {"file": "other"}}, "the rows to learn from are others"),
    ],
)
def test_a_run_is_not_resumed_with_other_options_or_data(
    data: Path, tmp_path: Path, die_at: Callable[[int], None], changes: dict[str, Any], says: str
) -> None:
    die_at(2)
    with pytest.raises(Killed):
        train(data, tmp_path, tmp_path / "run")
    if "data" in changes:
        data = write_jsonl(tmp_path / "other.jsonl", make_rows(400, seed=7))
        changes = {}
    with pytest.raises(CheckpointError, match=says):
        train(data, tmp_path, tmp_path / "run", resume=True, **changes)
    with pytest.raises(Exception, match="Or go on with the run in it: --resume"):
        train(data, tmp_path, tmp_path / "run")


def test_a_job_that_is_tried_again_resumes_by_itself(site: Path, die_at: Callable[[int], None]) -> None:  # noqa: F811
    """The attempts lie side by side, and their checkpoints beside them, as the hub arranges it."""
    settings = LearnSettings(home=site / "home", threads=1)
    shared = {"checkpoints": "../checkpoints", "id": "job-1"}
    whole = do_job(make_job(site, "v1"), settings, device="cpu")
    die_at(15)
    with pytest.raises(Killed):
        do_job(make_job(site, "job/attempt-1", version="v2", **shared), settings, device="cpu")
    assert len(list((site / "jobs/job/checkpoints").iterdir())) == 1
    again = do_job(make_job(site, "job/attempt-2", version="v3", **shared), settings, device="cpu")
    progress = (site / "jobs/job/attempt-2/progress.jsonl").read_text()
    assert '"note":"epoch 1/3' not in progress  # it was done by the first attempt
    assert not (site / "jobs/job/checkpoints").exists()
    store = Store(site / "registry")
    digests = [
        [layer["digest"] for layer in json.loads(store.manifest_bytes("sentiment", digest))["layers"][:4]]
        for digest in (whole.digest, again.digest)
    ]
    assert digests[0] == digests[1]


def test_a_job_whose_corrections_have_changed_begins_anew(site: Path, die_at: Callable[[int], None]) -> None:  # noqa: F811
    settings = LearnSettings(home=site / "home", threads=1)
    die_at(9)
    with pytest.raises(Killed):
        do_job(make_job(site, "job/attempt-1", version="v1", checkpoints="../checkpoints"), settings, device="cpu")
    directory = make_job(site, "job/attempt-2", version="v2", checkpoints="../checkpoints")
    write_jsonl(directory / "corrections.jsonl", make_rows(50, seed=2))
    do_job(directory, settings, device="cpu")
    assert '"note":"epoch 1/3' in (directory / "progress.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_at_random_moments_changes_nothing_in_what_training_ends_with(data: Path, tmp_path: Path) -> None:
    """Real processes, real SIGKILL: also while a checkpoint is being written."""
    environ = os.environ | {"MILLPOND_LEARN_THREADS": "1", "MILLPOND_LEARN_CHECKPOINT_S": "0.05"}
    without = environ | {"MILLPOND_LEARN_CHECKPOINT_S": "0"}
    options = (
        "--model seqcnn --option embedding=16 --option filters=16 --option min_count=1 --epochs 12 --batch-size 16"
    )
    schedule = "--schedule cosine --warmup 0.1 --clip-norm 1 --by-length --device cpu --validation 0.1 --json"
    command = [sys.executable, "-m", "millpond", "learn", "train", "--file", str(data)]
    command += [*options.split(), *schedule.split(), "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], env=without, check=True, capture_output=True, timeout=250)

    rng = random.Random(time.time_ns())
    kills = 0
    while kills < KILLS:
        seen = newest(killed)
        with subprocess.Popen([*command, str(killed), "--resume"], env=environ, stdout=subprocess.DEVNULL) as process:
            try:
                deadline = time.monotonic() + 200
                while newest(killed) == seen and process.poll() is None:
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
                time.sleep(rng.uniform(0, 0.1))  # anywhere from here on, amid a checkpoint too
            finally:
                process.kill()
        if process.returncode == 0:
            break
        kills += 1
    assert kills >= 2, "it ended before it could be killed: make the training longer"
    done = subprocess.run(
        [*command, str(killed), "--resume"], env=without, check=True, capture_output=True, timeout=250
    )
    if kills == KILLS:
        assert json.loads(done.stdout)["resumed"] is not None
    assert weights(killed) == weights(whole)
    losses = [
        [
            (epoch["loss"], epoch["validation_loss"])
            for epoch in json.loads((place / "metrics.json").read_text())["epochs"]
        ]
        for place in (whole, killed)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def newest(directory: Path) -> str:
    """Return the name of the newest checkpoint of a run."""
    return max((path.name for path in (directory / "checkpoints").glob("0*.safetensors")), default="")
