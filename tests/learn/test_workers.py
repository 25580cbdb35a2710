"""Several workers with Ray Train, on the processor by gloo: real processes, of which none is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from millpond.learn.export import read_model
from millpond.learn.options import TrainingError
from millpond.learn.recipes import read_recipe
from millpond.learn.run import run
from millpond.learn.workers import why_ended
from millpond.settings import LearnSettings, load

from .conftest import make_rows, write_jsonl

SIZES = ["--option", "min_count=1", "--option", "embedding=8", "--option", "filters=8"]
STILL = ["--option", "dropout=0", "--option", "embedding_dropout=0"]
GONE_S = 30.0


def command(data: Path, out: Path, *more: object) -> list[str]:
    common = ["--model", "seqcnn", *SIZES, "--file", data, "--device", "cpu", "--out", out, *more]
    return [sys.executable, "-m", "millpond", "learn", "train", *map(str, common)]


@contextmanager
def training(data: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a training by two workers that would not end soon; it has a checkpoint, and leaves no process."""
    environ = os.environ | {"MILLPOND_LEARN_CHECKPOINT_S": "0.05"}
    endless = command(data, out, "--gpus", 2, "--batch-size", 8, "--epochs", 2000)
    process = subprocess.Popen(endless, env=environ, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 150
    while not list(out.glob("checkpoints/*.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)
    started = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in child.name() for child in started)
    yield process
    _, alive = psutil.wait_procs(started, timeout=GONE_S)
    assert not alive


def _train_workers(of: int) -> list[psutil.Process]:
    below = psutil.Process(of).children(recursive=True)
    return [process for process in below if "RayTrainWorker" in " ".join(process.cmdline())]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_workers_come_to_what_one_comes_to_at_twice_their_batch(tmp_path: Path) -> None:
    """The last batch of 303 rows is of one: one worker has a row, and the other none."""
    data = write_jsonl(tmp_path / "reviews.jsonl", make_rows(399))
    runs = []
    for workers in (1, 2):
        out = tmp_path / f"run{workers}"
        full = command(data, out, *STILL, "--gpus", workers, "--batch-size", 151, "--epochs", 2, "--json")
        done = subprocess.run(full, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        runs.append((json.loads(done.stdout), read_model(out / "model")[0].state_dict()))
    (alone, weights), (shared, shared_weights) = runs
    assert alone["data"]["train_rows"] % 151 == 1
    assert (alone["workers"], shared["workers"]) == (1, 2)
    for ours, theirs in zip(shared["epochs"], alone["epochs"], strict=True):
        for value in ("loss", "accuracy", "validation_loss", "validation_accuracy", "learning_rate"):
            assert ours[value] == pytest.approx(theirs[value], rel=1e-5)
    assert shared["test"]["log_loss"] == pytest.approx(alone["test"]["log_loss"], rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(shared_weights[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_that_dies_ends_the_training_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    data, out = write_jsonl(tmp_path / "reviews.jsonl", make_rows(300)), tmp_path / "run"
    with training(data, out) as process:
        _train_workers(process.pid)[-1].kill()
        _, told = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "a worker ended before the training did: it was killed, or it crashed" in " ".join(told.split())
        assert "Traceback" not in told
    assert list(out.glob("checkpoints/*.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_ends_all_workers_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    data, out = write_jsonl(tmp_path / "reviews.jsonl", make_rows(300)), tmp_path / "run"
    with training(data, out) as process:
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 130, told
        assert "Traceback" not in told
    assert list(out.glob("checkpoints/*.safetensors"))


def test_what_a_worker_raised_is_told_before_what_the_others_saw_of_it() -> None:
    failure = RuntimeError("Training failed due to worker errors")
    lost = RuntimeError("[gloo/pair.cc:537] Read error [127.0.0.1]:9639: Connection reset by peer.")
    failure.worker_failures = {0: lost, 1: ValueError("Traceback\n  …\nValueError: the disk is full.")}  # type: ignore[attr-defined]
    assert why_ended(failure) == "ValueError: the disk is full"
    failure.worker_failures = {0: lost}  # type: ignore[attr-defined]
    assert why_ended(failure).startswith("it was killed, or it crashed")
    assert why_ended(OSError("no room")) == "no room"


def test_gpus_that_are_not_here_are_told_of_before_any_row_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only --device cpu has the workers share the processor."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    recipe = read_recipe(None, {"data": {"file": str(tmp_path / "none.csv")}})
    for device, told in (("auto", "there are 1 GPUs"), ("cuda", "there are 1 GPUs"), ("meta", "needs GPUs of this")):
        with pytest.raises(TrainingError, match=told):
            run(recipe, load(LearnSettings), device=device, name="a", out=None, report=lambda at: None, workers=2)


def test_several_workers_do_not_train_in_paddle(tmp_path: Path) -> None:
    data = {"file": str(tmp_path / "none.csv")}
    recipe = read_recipe(None, {"data": data, "model": {"architecture": "seqcnn"}, "training": {"framework": "paddle"}})
    with pytest.raises(TrainingError, match="in torch only"):
        run(recipe, load(LearnSettings), device="cpu", name="a", out=None, report=lambda at: None, workers=2)
