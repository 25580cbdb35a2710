"""Runs in MLflow, read back with its own client; and servers that are away, which end nothing and hold up little."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from millpond.learn.progress import Epoch
from millpond.learn.recipes import read_recipe
from millpond.learn.run import run
from millpond.learn.tracking import TrackingError, tracker
from millpond.settings import LearnSettings

from .conftest import make_rows, write_jsonl

# MLflow's own: SQLAlchemy 2.1 finds its mapping old-fashioned; it is imported within a test.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.slow
def test_a_run_is_in_the_local_store_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the local store without a server: parameters, curves, pictures, report, model and the data's digest."""
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_jsonl(tmp_path / "d.jsonl", make_rows(300))
    model = {"options": {"buckets": 1024, "min_count": 1}}
    recipe = read_recipe(None, {"data": {"file": str(tmp_path / "d.jsonl")}, "model": model, "validation": 0.2})
    warnings: list[str] = []
    found = tracker(True, tmp_path / "home", warnings.append)
    assert found is not None
    settings = LearnSettings(home=tmp_path / "home", threads=1)
    done = run(recipe, settings, device="cpu", name="x", out=tmp_path / "run", report=lambda at: None, tracker=found)
    assert warnings == []

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/home/mlflow/mlflow.db")
    seen = client.get_run(found.run_id)
    assert seen.info.status == "FINISHED"
    assert seen.data.params["model.options.buckets"] == "1024"
    assert seen.data.params["training.learning_rate"] == "0.01"
    assert seen.data.tags["data.digest"] == done.dataset.digest
    assert seen.data.metrics["test_accuracy"] == pytest.approx(done.evaluation.accuracy, abs=1e-6)
    curve = client.get_metric_history(found.run_id, "validation_loss")
    assert [point.step for point in curve] == [1, 2, 3]
    assert [point.value for point in curve] == [epoch.validation_loss for epoch in done.trained.training.epochs]
    files = {file.path for file in client.list_artifacts(found.run_id)}
    assert files >= {"model", "report.html", "training.png", "evaluation.png", "metrics.json"}
    place = Path(seen.info.artifact_uri.removeprefix("file://"))
    assert place.is_relative_to(tmp_path / "home/mlflow")
    for name in ("weights.safetensors", "model.onnx", "config.json", "tokenizer.json"):
        assert (place / "model" / name).read_bytes() == (tmp_path / "run/model" / name).read_bytes()


@pytest.fixture
def silent_server() -> Iterator[int]:
    """A server that takes connections and never answers."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def take() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=take)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in held:
            connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refuses", "silent"])
def test_a_server_that_is_away_costs_one_warning_and_little_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: int, kind: str
) -> None:
    pytest.importorskip("mlflow")
    with closing(socket.create_server(("127.0.0.1", 0))) as gone:
        port = gone.getsockname()[1]
    port = silent_server if kind == "silent" else port
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    warnings: list[str] = []
    found = tracker(False, tmp_path, warnings.append)
    assert found is not None
    began = time.monotonic()
    found.start(tmp_path / "run", {})
    found.epoch(Epoch(1, 0.5, 0.8, None, None, 1.0))
    found.fail()
    assert time.monotonic() - began < 30
    assert len(warnings) == 1
    assert "Training goes on without it" in warnings[0]
    assert not found.is_on


def test_nothing_is_tracked_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracker(False, tmp_path, print) is None
    assert not list(tmp_path.glob("mlflow"))


@pytest.mark.parametrize("how", ["option", "variable"])
def test_without_mlflow_the_error_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    if how == "variable":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(TrackingError, match=r"pip install 'millpond\[mlflow\]'"):
        tracker(how == "option", tmp_path, print)


def test_training_without_tracking_does_not_load_mlflow() -> None:
    code = "import sys, millpond.learn.run, millpond.cli.learn; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
