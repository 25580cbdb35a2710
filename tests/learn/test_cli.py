"""`millpond learn` as a person and as a script use it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from millpond import MillpondError
from millpond.cli.learn import app
from millpond.learn.export import read_model
from millpond.registry import Store, verify

from .conftest import make_rows, write_jsonl

SMALL = ["--option", "buckets=4096", "--option", "min_count=1", "--device", "cpu"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "reviews.jsonl", make_rows(500))


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_data_lists_the_corpora() -> None:
    rows = json.loads(invoke("data", "--json"))
    assert [row["name"] for row in rows] == ["imdb", "imdb-train"]
    assert [row["official_test"] for row in rows] == [True, False]
    assert "millpond learn data imdb" in invoke("data")


def test_data_checks_a_file_and_shows_bad_rows(data: Path) -> None:
    with data.open("a") as file:
        file.write("broken\n")
    found = json.loads(invoke("data", "--file", data, "--json"))
    assert found["bad_rows"] == 1
    assert found["first_bad_rows"][0]["where"] == "reviews.jsonl line 501"
    assert sum(found["rows"]["train"].values()) == 400
    assert found["digest"].startswith("sha256:")
    assert "line 501: not JSON" in invoke("data", "--file", data)


def test_accuracy_by_source_is_shown_for_the_files_of_a_pattern(tmp_path: Path) -> None:
    for number in range(2):
        write_jsonl(tmp_path / f"[b]{number}.jsonl", make_rows(200, seed=number))
    shown = invoke("train", "--file", tmp_path / "*.jsonl", *SMALL, "--out", tmp_path / "run")
    assert all(f" [b]{number}.jsonl " in shown for number in range(2))
    assert "source" in shown
    one = invoke("evaluate", tmp_path / "run", "--file", tmp_path / "*1.jsonl", "--device", "cpu")
    assert "source" not in one


def test_train_evaluate_export(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = json.loads(invoke("train", "--file", data, *SMALL, "--out", run, "--json"))
    assert summary["test"]["accuracy"] > 0.95
    assert summary["data"]["train_rows"] == 380
    assert set(summary["seconds"]) >= {"data", "encode", "train", "evaluate", "export"}
    assert json.loads((run / "metrics.json").read_text())["test"] == summary["test"]
    assert (summary["ended"], summary["resumed"]) == ("finished", None)
    assert summary["training"]["schedule"] == "constant"
    for name in ("training.png", "evaluation.png", "report.html", "mistakes.jsonl", "model/model.onnx"):
        assert (run / name).is_file()

    again = json.loads(invoke("evaluate", run, "--file", data, "--device", "cpu", "--json", "--out", tmp_path / "e"))
    assert again["accuracy"] == summary["test"]["accuracy"]
    assert (tmp_path / "e/evaluation.png").is_file()

    pushed = json.loads(invoke("export", run, "--name", "mine", "--tag", "candidate", "--json"))
    assert (pushed["name"], pushed["version"]) == ("mine", "v1")
    home = Path(os.environ["MILLPOND_HOME"])
    store = Store(home / "registry")
    assert store.resolve("mine:candidate") == pushed["digest"]
    model = store.checkout("mine", pushed["digest"], tmp_path / "checkout")
    verify(model, home / "keys/signing.pub")
    assert read_model(model)[2].version == "v1"
    assert json.loads(invoke("export", run, "--name", "mine", "--json"))["version"] == "v2"


def test_a_directory_trains_without_leaks_and_the_lineage_says_so(tmp_path: Path) -> None:
    rows = make_rows(120)
    for split, members in (("train", rows), ("test", [*make_rows(40, seed=1), *rows[:6]])):
        for number, (text, label) in enumerate(members):
            path = tmp_path / "texts" / split / label / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    run = tmp_path / "run"
    options = ["--file", tmp_path / "texts", "--drop-leaks", *SMALL, "--out", run, "--json"]
    summary = json.loads(invoke("train", *options))
    assert summary["data"]["dropped_leaks"] == 6
    assert "6 rows whose text is in the test split were dropped" in summary["data"]["source"]
    assert summary["recipe"]["data"]["drop_leaks"]
    config = read_model(run / "model")[2]
    assert config.lineage.dropped_leaks == 6
    assert {source.digest for source in config.data} == {summary["data"]["digest"]}


def test_people_see_a_table_and_where_the_run_is(data: Path, tmp_path: Path) -> None:
    shown = invoke("train", "--file", data, *SMALL, "--out", tmp_path / "run", "--train-rows", 100)
    assert "negative" in shown
    assert "accuracy" in shown
    assert "official" not in shown
    assert "Run:" in shown
    assert "report.html" in shown.replace("\n", "")


def test_a_recipe_and_options_train_alike(data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "train_rows = 300\nseed = 2\n[data]\nfile = 'reviews.jsonl'\n"
        "[model.options]\nbuckets = 4096\nmin_count = 1\n[training]\nepochs = 2\n"
    )
    options = ["--file", data, *SMALL, "--train-rows", 300, "--seed", 2, "--epochs", 2]
    found = [
        json.loads(invoke("train", *how, "--device", "cpu", "--out", tmp_path / f"run{i}", "--json"))
        for i, how in enumerate((["--recipe", recipe], options))
    ]
    losses = [[epoch["loss"] for epoch in summary["epochs"]] for summary in found]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_options_of_training_reach_it_and_padding_is_shown(data: Path, tmp_path: Path) -> None:
    shown = invoke(
        "train", "--file", data, "--device", "cpu", "--out", tmp_path / "run", "--train-rows", 200,
        "--model", "seqcnn", "--option", "min_count=1", "--option", "embedding=8", "--option", "filters=8",
        "--schedule", "linear", "--warmup", 0.1, "--clip-norm", 1, "--precision", "bfloat16", "--by-length",
        "--patience", 5, "--no-compile", "--epochs", 1, "--batch-size", 8,
    )  # fmt: skip
    how = json.loads((tmp_path / "run/metrics.json").read_text())["training"]
    assert (how["schedule"], how["warmup"], how["clip_norm"], how["precision"]) == ("linear", 0.1, 1.0, "bfloat16")
    assert (how["by_length"], how["patience"], how["compile"]) == (True, 5, False)
    assert "was padding" in shown


def test_a_loss_that_is_no_number_ends_with_status_1_and_the_best_epoch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learning rate goes wild in the third epoch."""
    monkeypatch.setattr("millpond.learn.train.rate_at", lambda step, steps, options: 0.01 if step < 32 else 1e30)
    run = tmp_path / "run"
    model = ["--model", "seqcnn", "--option", "min_count=1", "--option", "embedding=8", "--option", "filters=8"]
    arguments = ["train", "--file", data, *model, "--epochs", 5, "--batch-size", 24, "--device", "cpu", "--out", run]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 1, done.output
    assert "at step 2 of epoch 3" in done.output.replace("\n", " ")
    assert "The model is that of epoch 2" in done.output.replace("\n", " ")
    read_model(run / "model")
    assert "Training ended early" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--corpus", "imdb", "--precision", "int8"], "Invalid enum value 'int8'"),
        (["train", "--corpus", "imdb", "--resume"], "nothing to resume"),
        (["train"], "exactly one of"),
        (["train", "--corpus", "imbd"], "no corpus 'imbd'"),
        (["train", "--file", "none.csv"], "does not exist"),
        (["train", "--corpus", "imdb", "--model", "bert"], "no model 'bert'"),
        (["train", "--corpus", "imdb", "--option", "bucket=3"], "bucket"),
        (["evaluate", "nowhere", "--corpus", "imdb"], "nowhere"),
        (["export", "nowhere"], "nowhere"),
        (["job", "nowhere"], "is not a job"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millpond.process.die_with_parent", lambda: None)
    with pytest.raises(MillpondError, match=says):
        invoke(*arguments)


def test_a_run_does_not_write_over_another(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    with pytest.raises(MillpondError, match="is not empty"):
        invoke("train", "--file", data, *SMALL, "--out", tmp_path / "run")


def test_a_model_is_not_measured_on_labels_it_does_not_know(data: Path, tmp_path: Path) -> None:
    invoke("train", "--file", data, *SMALL, "--out", tmp_path / "run", "--json")
    other = write_jsonl(tmp_path / "other.jsonl", make_rows(90, ("negative", "plot")))
    with pytest.raises(MillpondError, match="labels that the model does not know: plot"):
        invoke("evaluate", tmp_path / "run", "--file", other)


@pytest.mark.slow
def test_ctrl_c_leaves_a_model_and_nothing_running(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "millpond", "learn", "train", "--file", data, *SMALL, "--epochs", "10000"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([*map(str, command), "--out", str(tmp_path / "run")], stdout=output, stderr=output)
    # The loop has begun when the process has used the processor for a while after its imports.
    deadline = time.monotonic() + 60
    while b"epoch" not in log.read_bytes():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert "Interrupted" in log.read_text()
    read_model(tmp_path / "run" / "model")
