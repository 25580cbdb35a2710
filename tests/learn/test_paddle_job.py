"""Training in Paddle on a device of the pool, as a job of its host's Ray: as on this machine, and nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from attacks.test_pool_confined import kernel_has_landlock
from millpond import MillpondError
from millpond.cli.learn import app
from millpond.learn.encoded import Encoded
from millpond.learn.export import read_model
from millpond.learn.paddle.messages import CHECKPOINT, JOB, TRAINED, WEIGHTS, check_rows, write_rows
from millpond.pool import wire
from pool_site import BrokerProcess
from ray_site import RAY_TOKEN, Ray

from .conftest import make_rows, write_jsonl

TRAIN = [sys.executable, "-m", "millpond", "learn", "train"]
MODEL = "--model seqcnn --framework paddle --option embedding=16 --option filters=24 --option min_count=1"


def test_the_files_of_a_job_are_those_that_the_pool_lets_through(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for split in ("train", "validation"):
        write_rows(work, split, Encoded(np.zeros(1, np.int32), np.array([0, 1])), np.zeros(1, np.int64))
    written = {path.name for path in work.iterdir()}
    assert written | {JOB, WEIGHTS, CHECKPOINT} == set(typing.get_args(wire.JobInput))
    assert {TRAINED, CHECKPOINT} == set(typing.get_args(wire.JobOutput))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lease", "whole"], "--lease is for --framework paddle"),
        ([*MODEL.split(), "--lease", "whole", "--device", "cuda"], "on a device of the pool, not on cuda"),
        ([*MODEL.split(), "--lease", "1"], "write `whole`, or a part of a device such as 8GiB"),
        ([*MODEL.split(), "--lease", "much"], "--lease is 'much', which is not a size"),
        ([*MODEL.split(), "--lease", "whole"], "No pool can be reached"),
        ([*MODEL.split(), "--lease", "8GiB", "--gpus", "2"], "No pool can be reached"),
    ],
)
def test_before_any_data_is_read_what_a_lease_is_not_for_is_refused(
    options: list[str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MILLPOND_POOL_ADDRESS", "127.0.0.1:9")
    command = ["train", "--file", str(tmp_path / "no.csv"), *options, "--out", str(tmp_path / "run")]
    with pytest.raises(MillpondError, match=says):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def ray() -> Iterator[Ray]:
    with contextlib.closing(Ray()) as started:
        yield started


@pytest.fixture
def site(ray: Ray, tmp_path: Path) -> Iterator[BrokerProcess]:
    """A host with a CPU and Paddle on it, and what a client of it needs."""
    environ = {
        "MILLPOND_POOL_RAY_ADDRESS": ray.address,
        "MILLPOND_POOL_RAY_TOKEN": RAY_TOKEN,
        "MILLPOND_POOL_MEMORY": "2GiB",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    with contextlib.closing(BrokerProcess(tmp_path / "pool", **environ)) as started:
        started.environ |= {"MILLPOND_LEARN_THREADS": "1", "MILLPOND_HOME": str(tmp_path / "client")}
        # This client has no Paddle: only where it trains on this machine may it be looked for.
        started.environ |= {"MILLPOND_LEARN_PADDLE_PYTHON": "/nowhere/python"}
        yield started


def command(tmp_path: Path, *options: str) -> list[str]:
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(500))
    return [*TRAIN, "--file", str(data), *MODEL.split(), "--validation", "0.1", "--batch-size", "16", *options]


def jobs_of(site: BrokerProcess) -> list[psutil.Process]:
    """Return the processes that train for a host."""
    place = str(site.home / "state/pool/jobs")
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            arguments = process.cmdline()
            if "millpond.learn.paddle" in arguments and place in arguments[-2]:
                found.append(process)
    return found


def until(is_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 200
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_free(site: BrokerProcess) -> None:
    until(lambda: site.status().devices[0].free_bytes == 2 * 2**30)
    assert jobs_of(site) == []
    assert list((site.home / "state/pool/jobs").iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_ends_with_the_weights_of_this_machine_though_it_was_killed_and_resumed(
    site: BrokerProcess, tmp_path: Path
) -> None:
    train = command(tmp_path, "--epochs", "8", "--schedule", "cosine", "--json", "--out")
    here, there = tmp_path / "here", tmp_path / "there"
    local = site.environ | {"MILLPOND_LEARN_PADDLE_PYTHON": sys.executable}
    subprocess.run([*train, str(here), "--device", "cpu"], env=local, check=True, capture_output=True, timeout=250)
    saving = site.environ | {"MILLPOND_LEARN_CHECKPOINT_S": "0.1"}
    lease = ["--lease", "1GiB"]
    with subprocess.Popen([*train, str(there), *lease], env=saving, stdout=subprocess.DEVNULL) as process:
        until(lambda: len(list((there / "checkpoints").glob("0*.safetensors"))) > 1 or process.poll() is not None)
        process.kill()
    assert_free(site)
    assert [status.state for status in site.status().leases] == ["failed"]
    done = subprocess.run([*train, str(there), *lease, "--resume"], env=saving, capture_output=True, timeout=250)
    assert done.returncode == 0, done.stderr.decode()
    summary = json.loads(done.stdout)
    assert summary["resumed"] is not None
    assert summary["trained_by"].startswith("PaddlePaddle 3.")
    assert " on the pool's CPU" in summary["trained_by"]
    assert not (there / "checkpoints").exists()
    weights = [(place / "model/weights.safetensors").read_bytes() for place in (here, there)]
    assert weights[0] == weights[1]
    assert_free(site)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_in_a_terminal_stops_the_job_which_is_confined_and_writes_the_model(
    site: BrokerProcess, ray: Ray, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    train = command(tmp_path, "--epochs", "10000", "--lease", "whole", "--out", str(tmp_path / "run"))
    with log.open("wb") as file:
        process = subprocess.Popen(train, env=site.environ, stdout=file, stderr=file, start_new_session=True)
    try:
        until(lambda: "epoch 2" in log.read_text() or process.poll() is not None)
        (job,) = jobs_of(site)
        assert "NoNewPrivs:\t1\n" in Path(f"/proc/{job.pid}/status").read_text()
        assert ("not kept from its host" in ray.printed()) == (not kernel_has_landlock())
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert "Interrupted" in log.read_text()
    assert [status.state for status in site.status().leases] == ["released"]
    read_model(tmp_path / "run/model")
    assert_free(site)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_lease_that_is_lost_ends_the_command_and_says_so(site: BrokerProcess, tmp_path: Path) -> None:
    log = tmp_path / "log"
    train = command(tmp_path, "--epochs", "10000", "--lease", "whole", "--out", str(tmp_path / "run"))
    environ = site.environ | {"MILLPOND_LEARN_CHECKPOINT_S": "0.1"}
    with log.open("wb") as file, subprocess.Popen(train, env=environ, stdout=file, stderr=file) as process:
        until(lambda: list((tmp_path / "run/checkpoints").glob("0*")) or process.poll() is not None)
        (worker,) = site.workers()
        worker.kill()
        assert process.wait(60) == 2
    said = log.read_text()
    assert "is lost: worker" in said
    assert "was ended by SIGKILL. With --resume it goes on from its last checkpoint." in said
    assert "Traceback" not in said
    assert_free(site)


GOOD = (np.array([1, 2, 3, 0], np.int32), np.array([0, 2, 4]), np.array([0, 1]))


@pytest.mark.parametrize(
    "change",
    [
        {"ids": np.array([1, 2, 3, 4], np.int32)},
        {"ids": np.array([1, 2, 3, -1], np.int32)},
        {"ids": np.array([1, 2, 3, 0], np.int64)},
        {"ids": np.array([[1, 2], [3, 0]], np.int32)},
        {"starts": np.array([0, 2, 5])},
        {"starts": np.array([0, 9, 4])},
        {"starts": np.array([1, 2, 4])},
        {"starts": np.array([-1, 2, 4])},
        {"starts": np.array([0])},
        {"starts": np.array([0.0, 2.0, 4.0])},
        {"starts": np.array([0, 1, 2, 4])},
        {"labels": np.array([0, 2])},
        {"labels": np.array([-1, 1])},
        {"labels": np.array([0])},
        {"labels": np.array([0, 1], np.uint8)},
    ],
)
def test_rows_that_a_model_has_no_room_for_are_refused(change: dict[str, typing.Any]) -> None:
    ids, starts, labels = GOOD
    check_rows(Encoded(ids, starts), labels, words=4, classes=2)
    changed = {"ids": ids, "starts": starts, "labels": labels} | change
    with pytest.raises(ValueError, match="the rows"):
        check_rows(Encoded(changed["ids"], changed["starts"]), changed["labels"], words=4, classes=2)
