"""A hub on a home of its own, with keys, a recipe and a training command that is a real small program."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flask
import httpx
import pytest
from flask.testing import FlaskClient

from millpond.hub.app import create_app
from millpond.hub.controller import Controller
from millpond.hub.db import migrate
from millpond.hub.state import Hub
from millpond.registry import generate_key_pair, sign
from millpond.settings import HubSettings, RegistrySettings
from waiting import wait_for

JOB = Path(__file__).with_name("fake_job.py")
GOOD = {"right": 900, "of": 1000}


def sign_models(place: Path) -> None:
    """Make two pairs of keys, and small models of the versions v1 to v10 that are signed with each."""
    for kind in ("signed", "forged"):
        generate_key_pair(place / kind / "keys/signing.key", place / kind / "keys/signing.pub")
        for number in range(1, 11):
            model = place / kind / f"v{number}"
            model.mkdir()
            config = {
                "name": "sentiment",
                "version": f"v{number}",
                "labels": ["negative", "positive"],
                "architecture": "ngram",
                "metrics": {"test_accuracy": 0.9 + number / 300},
                "created": f"2026-11-23T16:{number:02}:00Z",
            }
            (model / "config.json").write_text(json.dumps(config))
            for name in ("weights.safetensors", "model.onnx", "tokenizer.json", "golden.jsonl"):
                (model / name).write_text(f"{name} of v{number}")
            sign(model, place / kind / "keys/signing.key")


class Bench:
    """A hub's state on disk, and the parts that work on it, driven step by step."""

    def __init__(self, models: Path, home: Path, **changes: Any):
        self.home = home
        self.recipe = home / "recipe/recipe.toml"
        self.recipe.parent.mkdir(parents=True)
        self.recipe.with_name("models").symlink_to(models)
        self.recipe.write_text("# the job of these tests needs none\n")
        self.plan(GOOD)
        values = {
            "home": home,
            "recipe": self.recipe,
            "train_command": shlex.join([sys.executable, str(JOB)]),
            "retrain_after": 10,
            "job_timeout_s": 30.0,
        }
        self.settings = HubSettings(**(values | changes))
        self.registry = RegistrySettings(home=home)
        shutil.copytree(models / "signed/keys", home / "keys")
        self.hub = Hub.open(self.settings, self.registry)
        migrate(self.hub.database)
        self.controller = Controller(self.hub, backoff_s=0.01)

    def plan(self, *attempts: dict[str, Any]) -> None:
        """Say how the next attempts of training jobs go."""
        self.recipe.with_name("plan.json").write_text(json.dumps(attempts))
        self.recipe.with_name("attempts").write_text("")

    def turn(self, is_done: Callable[[], object], timeout_s: float = 30.0) -> None:
        """Let the controller work until `is_done`."""
        deadline = time.monotonic() + timeout_s
        while not is_done():
            assert time.monotonic() < deadline, "the controller did not get there in time"
            self.controller.step(time.time())
            time.sleep(0.01)

    def restart_controller(self) -> None:
        """Put a new controller in place of one that the kernel would have ended, its job with it."""
        if self.controller._process is not None:
            self.controller._process._process.kill()
            self.controller._process._process.wait()
        self.controller = Controller(self.hub, backoff_s=0.01)

    def close(self) -> None:
        self.controller.close()
        self.hub.database.close()


@pytest.fixture(scope="session")
def make_bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bench]:
    models = tmp_path_factory.mktemp("models")
    sign_models(models)
    return functools.partial(Bench, models)


@pytest.fixture
def bench(tmp_path: Path, make_bench: Callable[..., Bench]) -> Iterator[Bench]:
    made = make_bench(tmp_path / "hub-home")
    yield made
    made.close()


class Served:
    """A hub as a user has it: `millpond hub serve` in a process of its own, on a port of its own."""

    def __init__(self, bench: Bench, **environ: str):
        self.bench = bench
        settings = bench.settings
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")} | {
            "MILLPOND_HOME": str(settings.home),
            "MILLPOND_HUB_PORT": "0",
            "MILLPOND_HUB_RECIPE": str(settings.recipe),
            "MILLPOND_HUB_TRAIN_COMMAND": settings.train_command,
            "MILLPOND_HUB_RETRAIN_AFTER": str(settings.retrain_after),
            "PYTHONUNBUFFERED": "1",
            **environ,
        }
        self.log = bench.home / "serve.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> None:
        """Start it, and wait until it listens."""
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "millpond", "hub", "serve"]
            self.process = subprocess.Popen(command, env=self.environ, stdout=log, stderr=subprocess.STDOUT)
        self.url = self._wait_line(rb"millpond hub: listening on (\S+)")
        port = self.url.rpartition(":")[2]
        self.environ["MILLPOND_HUB_PORT"] = port  # clients find it again after a restart
        self.wait(lambda: httpx.get(f"{self.url}/readyz").status_code == 200)

    def kill(self) -> None:
        """End it as a power cut would; its workers, its controller and their jobs go with it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it as its user would."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            finally:
                self.process.kill()
                self.process.wait()

    def wait(self, is_done: Callable[[], object], timeout_s: float = 30.0) -> None:
        """Wait until `is_done`; a hub that does not answer yet is no error."""
        wait_for(is_done, timeout_s, what=lambda: self.log.read_text()[-3000:], despite=(httpx.TransportError,))

    def _wait_line(self, pattern: bytes) -> str:
        found: list[bytes] = []

        def seen() -> bool:
            found[:] = re.findall(pattern, self.log.read_bytes())
            assert self.process is not None
            assert found or self.process.poll() is None, self.log.read_text()
            return bool(found)

        self.wait(seen)
        return found[0].decode()


@pytest.fixture
def serve(bench: Bench) -> Iterator[Callable[..., Served]]:
    """Give a function that serves the bench's state; what it started is stopped."""
    made: list[Served] = []

    def start(**environ: str) -> Served:
        served = Served(bench, **environ)
        made.append(served)
        served.start()
        return served

    yield start
    for served in made:
        served.stop()


@pytest.fixture
def app(bench: Bench) -> Iterator[flask.Flask]:
    made = create_app(bench.settings, bench.registry)
    yield made
    made.extensions["millpond.hub"].database.close()


@pytest.fixture
def client(app: flask.Flask) -> FlaskClient:
    return app.test_client()


def correction(number: int, **changes: Any) -> dict[str, Any]:
    """Return a correction as an edge sends it."""
    body = {
        "id": f"c-{number}",
        "text": f"Review number {number}: not my cup of tea.",
        "label": "negative",
        "predicted": "positive",
        "scores": {"negative": 0.4, "positive": 0.6},
        "model": {"name": "sentiment", "version": "v1", "digest": "sha256:" + "1" * 64},
        "created": "2026-11-23T16:00:00Z",
    }
    return body | changes


@pytest.fixture
def sent() -> Callable[..., dict[str, Any]]:
    return correction
