"""`millpond learn tune` as a person uses it: mistakes are explained, and real searches, killed and taken up again."""

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
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from millpond import MillpondError
from millpond.cli.learn import app
from millpond.learn.export import read_model
from millpond.learn.keeper import descendants
from millpond.learn.recipes import read_recipe
from millpond.learn.tune.record import Trial, read_trials
from millpond.registry import Store, verify
from pool_site import BrokerProcess, wait_for

from ..conftest import make_rows, write_jsonl

SMALL = ["--option", "buckets=1024", "--device", "cpu"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "reviews.jsonl", make_rows(400))


def recipe(tmp_path: Path, tune: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(f"[data]\nfile = 'reviews.jsonl'\n{tune}")
    return path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trials", "0"], "--trials"),
        (["--minutes", "0"], "--minutes"),
        (["--concurrent", "0"], "--concurrent"),
        (["--epochs", "0"], "--epochs"),
        (["--trials", "many"], "--trials"),
    ],
)
def test_a_budget_that_is_none_is_refused(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["tune", "--corpus", "imdb", *arguments])
    assert done.exit_code == 2
    assert says in done.output


@pytest.mark.parametrize(
    ("tune", "arguments", "says"),
    [
        ("[tune.space]\nlearning_rat = {low = 1, high = 2}", [], "no such option"),
        ("[tune.space]\nsmoothing = {low = 2, high = 1}", [], "is empty"),
        ("[tune]\nmetric = 'f1'", [], "Invalid enum value 'f1'"),
        ("[tune]\nvalidation = 0", [], "> 0"),
        ("[tune]\nspaces = 1", [], "unknown field `spaces`"),
        ("[distil]\nteacher = 'x'", [], "does not teach"),
        ("", ["--model", "bert"], "no model 'bert'"),
        ("", ["--resume"], "nothing to resume"),
        ("", ["--gpus-per-trial", "0.5"], "has no GPU"),
        ("", ["--lease", "much"], "--lease is 'much', which is not a size"),
        ("", ["--lease", ""], "--lease is '', which is not a size"),
    ],
)
def test_mistakes_are_explained_before_anything_is_run(
    data: Path, tmp_path: Path, tune: str, arguments: list[str], says: str
) -> None:
    with pytest.raises(MillpondError, match=says):
        CliRunner().invoke(
            app, ["tune", "--recipe", str(recipe(tmp_path, tune)), *SMALL, *arguments], catch_exceptions=False
        )


def test_without_ray_the_error_says_what_to_install(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MillpondError, match=r"needs Ray, which is not installed.*millpond\[ray\]"):
        CliRunner().invoke(app, ["tune", "--file", str(data), *SMALL], catch_exceptions=False)


def test_a_search_does_not_write_over_another_and_a_damaged_record_is_named(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "trials.jsonl").write_text("nonsense\n")
    arguments = ["tune", "--file", str(data), *SMALL, "--out", str(out)]
    with pytest.raises(MillpondError, match=r"is not empty.*--resume"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    with pytest.raises(MillpondError, match="line 1 is damaged"):
        CliRunner().invoke(app, [*arguments, "--resume"], catch_exceptions=False)
    (out / "tuning.json").write_text("{}")
    with pytest.raises(MillpondError, match="has ended"):
        CliRunner().invoke(app, [*arguments, "--resume"], catch_exceptions=False)


# --- real searches -----------------------------------------------------------------------------------------------


class Search:
    """The command in a process of its own."""

    def __init__(self, data: Path, out: Path, *arguments: object, **environ: str) -> None:
        command = [sys.executable, "-m", "millpond", "learn", "tune", "--file", data, *SMALL, "--out", out, *arguments]
        environ = os.environ | {"OMP_NUM_THREADS": "1", "MILLPOND_LEARN_THREADS": "1"} | environ
        self.out = out
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
        )
        self.started: set[tuple[int, int]] = set()
        """All that it has ever started."""

    def trials(self) -> list[Trial]:
        return read_trials(self.out / "trials.jsonl") if (self.out / "trials.jsonl").exists() else []

    def wait_for(self, ended: int) -> None:
        """Wait until so many trials have ended and another runs."""
        deadline = time.monotonic() + 150
        while True:
            self.started |= descendants({self.process.pid})
            trials = self.trials()
            if sum(trial.ended is not None for trial in trials) >= ended and any(not trial.ended for trial in trials):
                return
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self) -> str:
        out, err = self.process.communicate(timeout=200)
        assert "Traceback" not in err, err
        return out

    def left(self) -> list[psutil.Process]:
        """Return what it has started and still lives, 20 s after its end at most."""
        deadline = time.monotonic() + 20
        while True:
            living = [psutil.Process(pid) for pid, _ in self.started if psutil.pid_exists(pid)]
            living = [process for process in living if process.status() != psutil.STATUS_ZOMBIE]
            if not living or time.monotonic() > deadline:
                return living
            time.sleep(0.1)


@contextmanager
def searching(data: Path, out: Path, *arguments: object, **environ: str) -> Iterator[Search]:
    search = Search(data, out, *arguments, **environ)
    try:
        yield search
    finally:
        search.process.kill()
        search.process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_search_that_is_killed_goes_on_and_registers_its_winner(data: Path, tmp_path: Path) -> None:
    out, how = tmp_path / "out", ("--trials", 9, "--concurrent", 2, "--epochs", 3, "--json", "--register")
    with searching(data, out, *how) as search:
        search.wait_for(3)
        search.process.kill()
        search.process.wait()
        assert search.left() == []
    before = (out / "trials.jsonl").read_bytes()
    ended_before = [trial for trial in read_trials(out / "trials.jsonl") if trial.ended]
    with searching(data, out, *how, "--resume") as search:
        summary: dict[str, Any] = json.loads(search.end())
        assert search.process.returncode == 0
    assert (out / "trials.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    trials = read_trials(out / "trials.jsonl")
    assert len(trials) == 9
    assert all(trial.ended for trial in trials)
    # What had ended was not run again: each began once.
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    begun = [line["number"] for line in lines if line["kind"] == "started"]
    assert all(begun.count(trial.number) == 1 for trial in ended_before)
    assert len(begun) > 9  # what was cut off did begin again

    best = min(trials, key=lambda trial: trial.objective("loss") or 9.0)
    assert summary["best"]["parameters"] == best.parameters
    assert summary["winner"]["data"]["train_rows"] == 320  # all of them
    assert summary["winner"]["test"]["accuracy"] > 0.9
    for name in ("tuning.html", "history.png", "curves.png", "parameters.png", "winner/report.html"):
        assert (out / name).is_file()
    assert not (out / "rows").exists()
    assert read_recipe(out / "winner.toml").model.options["buckets"] == 1024

    home = Path(os.environ["MILLPOND_HOME"])
    store = Store(home / "registry")
    assert store.resolve("sentiment:candidate") == summary["registered"]["digest"]
    model = store.checkout("sentiment", summary["registered"]["digest"], tmp_path / "checkout")
    verify(model, home / "keys/signing.pub")
    assert read_model(model)[2].version == "v1"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ctrl_c_keeps_the_search_and_leaves_nothing_running(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with searching(data, out, "--minutes", 10, "--concurrent", 1, "--epochs", 200) as search:
        search.wait_for(1)
        search.process.send_signal(signal.SIGINT)
        shown = search.end()
        assert search.process.returncode == 130
        assert search.left() == []
    assert "epochs in" in shown
    assert (out / "tuning.html").is_file()
    assert not (out / "tuning.json").exists()  # it can go on


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_when_the_minutes_run_out_the_best_so_far_wins(data: Path, tmp_path: Path) -> None:
    """A trial that gets better with each of its epochs would not end by itself within them."""
    out = tmp_path / "out"
    with searching(data, out, "--minutes", 0.4, "--concurrent", 1, "--epochs", 10_000, "--register") as search:
        shown = search.end()
        assert search.process.returncode == 0
    assert "1 expired" in shown
    trials = read_trials(out / "trials.jsonl")
    assert trials[-1].state == "expired"
    assert all(trial.ended for trial in trials)
    summary = json.loads((out / "tuning.json").read_text())
    assert summary["search_s"] > 23
    assert [trial["state"] for trial in summary["trials"]] == [trial.state for trial in trials]
    best = min(trials, key=lambda trial: trial.objective("loss") or 9.0)
    assert summary["best"]["parameters"] == best.parameters
    assert summary["winner"]["data"]["train_rows"] == 320  # all of them
    store = Store(Path(os.environ["MILLPOND_HOME"]) / "registry")
    assert store.resolve("sentiment:candidate") == summary["registered"]["digest"]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_trials_train_on_the_pool_and_their_lease_is_given_back(
    number: signal.Signals, data: Path, tmp_path: Path
) -> None:
    """On the pool though `--device cpu` is given, which is where the winner would be trained."""
    site = BrokerProcess(tmp_path / "pool", MILLPOND_POOL_MEMORY="4GiB")
    pool = {name: site.environ[name] for name in ("MILLPOND_POOL_ADDRESS", "MILLPOND_POOL_TOKEN")}
    how = ("--lease", "1GiB", "--minutes", 10, "--concurrent", 1, "--epochs", 200)
    try:
        with searching(data, tmp_path / "out", *how, **pool) as search:
            search.wait_for(0)
            wait_for(lambda: search.trials()[0].epochs, 150)
            (lease,) = site.status().leases
            assert (lease.state, lease.memory_bytes) == ("active", 2**30)
            wait_for(lambda: site.lease_status(lease.lease).used_bytes)  # tensors of the trial
            search.process.send_signal(number)
            search.process.communicate(timeout=100)
            ended = site.wait_ended(lease.lease)
            assert ended.state in {"released", "failed"}
            assert len(site.status().leases) == 1  # all trials shared it
            assert search.left() == []
    finally:
        site.close()
