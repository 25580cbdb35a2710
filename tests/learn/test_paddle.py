"""Training in Paddle, in real child processes: the same numbers as in torch, and nothing left running."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch

from millpond.edge.engine import Engine
from millpond.learn import fit as fit_module
from millpond.learn.datasets import DataError, Dataset
from millpond.learn.encoded import Encoded
from millpond.learn.export import read_model
from millpond.learn.models import ModelOptions, TextModel, build, options_of
from millpond.learn.options import TrainingError, TrainOptions
from millpond.learn.paddle import parent
from millpond.learn.paddle.messages import write_rows
from millpond.learn.paddle.parent import train_in_paddle
from millpond.learn.paddle.place import Place
from millpond.learn.progress import Epoch, Training
from millpond.learn.recipes import read_recipe
from millpond.learn.run import run
from millpond.learn.train import predict, train
from millpond.registry import generate_key_pair, sign, verify
from millpond.settings import LearnSettings
from waiting import is_alive, wait_for

from .conftest import make_rows, write_jsonl

CPU = torch.device("cpu")
SMALL: dict[str, dict[str, Any]] = {
    "seqcnn": {"embedding": 16, "filters": 24, "min_count": 1},
    "lstm": {"embedding": 16, "width": 12, "hidden": 8, "min_count": 1},
}
STILL = {"seqcnn": {"dropout": 0.0, "embedding_dropout": 0.0}, "lstm": {"dropout": 0.0}}
HOW = TrainOptions(epochs=3, batch_size=50, learning_rate=0.01)
SCORES = """
import sys
from pathlib import Path
import numpy as np, safetensors.numpy
from millpond.learn.paddle.loop import predict
from millpond.learn.paddle.messages import read_rows
from millpond.learn.paddle.models import build
for architecture in ("seqcnn", "lstm"):
    work = Path(sys.argv[1]) / architecture
    model = build(architecture, safetensors.numpy.load_file(work / "weights.safetensors"), 0.5, 0.5)
    np.save(work / "scores.npy", predict(model, read_rows(work, "texts")[0], 4000, lambda: None))
assert "paddle" in sys.modules
assert "torch" not in sys.modules
"""


def fresh(dataset: Dataset, architecture: str, **changes: Any) -> tuple[TextModel, Encoded, ModelOptions]:
    options = options_of(architecture, SMALL[architecture] | changes)
    encoder = options.learn_encoder(dataset.train.texts)
    torch.manual_seed(0)
    model = build(architecture, options, encoder.rows, len(dataset.labels))
    data = Encoded.of(encoder, dataset.train.texts)
    model.prepare(data, dataset.train.labels)
    return model, data, options


def train_small(dataset: Dataset, architecture: str, how: TrainOptions = HOW, **given: Any) -> Training:
    model, data, options = fresh(dataset, architecture)
    validation = (data, dataset.train.labels)
    return train_in_paddle(
        model,
        data,
        dataset.train.labels,
        validation,
        how,
        **({"place": Place("cpu")} | given),
        architecture=architecture,
        model_options=options,
        seed=0,
    )


def child() -> psutil.Process:
    (found,) = psutil.Process().children()
    return found


def ctrl_c_at_epoch_1(epoch: Epoch) -> None:
    """Interrupt once only: the child may have done further epochs before it hears of it."""
    if epoch.epoch == 1:
        raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_equal_weights_give_equal_scores(three_labels: Dataset, tmp_path: Path) -> None:
    """Texts of all lengths, padded in one batch: of one word, of 300, and without any."""
    texts = ["", "great", "awful " * 300, "日本語 🙂", *three_labels.test.texts]
    expected = {}
    for architecture in SMALL:
        work = tmp_path / architecture
        work.mkdir()
        options = options_of(architecture, SMALL[architecture])
        encoder = options.learn_encoder(three_labels.train.texts)
        torch.manual_seed(1)
        model = build(architecture, options, encoder.rows, 3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)  # scores far from 1/3
        safetensors.torch.save_file(model.weights(), work / "weights.safetensors")
        encoded = Encoded.of(encoder, texts)
        write_rows(work, "texts", encoded, np.zeros(len(texts), np.int64))
        expected[architecture] = predict(model, encoded, CPU)
        assert np.ptp(expected[architecture], 0).min() > 0.05
    subprocess.run([sys.executable, "-W", "ignore", "-c", SCORES, str(tmp_path)], check=True, timeout=240)
    for architecture, scores in expected.items():
        assert np.load(tmp_path / architecture / "scores.npy") == pytest.approx(scores, abs=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("architecture", SMALL)
def test_the_same_beginning_and_order_give_the_same_losses_and_weights(architecture: str, small: Dataset) -> None:
    """With every option that changes a step, and no dropout: each framework draws its own random numbers."""
    how = TrainOptions(
        epochs=3, batch_size=60, learning_rate=0.01, schedule="cosine", warmup=0.2, clip_norm=0.1, by_length=True
    )
    made: list[tuple[TextModel, Training]] = []
    for framework in ("torch", "paddle"):
        model, data, options = fresh(small, architecture, **STILL[architecture])
        held = data.take(np.arange(100)), small.train.labels[:100]
        given = (model, data, small.train.labels, held, how)
        if framework == "torch":
            made.append((model, train(*given, CPU, seed=5)))
        else:
            named = {"architecture": architecture, "model_options": options}
            made.append((model, train_in_paddle(*given, place=Place("cpu"), seed=5, **named)))  # type: ignore[arg-type]
    (by_torch, one), (by_paddle, other) = made
    for ours, theirs in zip(one.epochs, other.epochs, strict=True):
        assert theirs.loss == pytest.approx(ours.loss, abs=1e-3)
        assert theirs.validation_loss == pytest.approx(ours.validation_loss, abs=1e-3)
        assert (theirs.learning_rate, theirs.padding) == (ours.learning_rate, ours.padding)
    assert one.epochs[-1].loss < one.epochs[0].loss - 0.02
    assert other.best == one.best
    for name, tensor in by_torch.weights().items():
        assert by_paddle.weights()[name].numpy() == pytest.approx(tensor.numpy(), abs=1e-3), name
    assert other.trained_by.startswith("PaddlePaddle 3.")
    assert "paddle" not in sys.modules


@pytest.mark.timeout(300)
def test_paddle_and_torch_are_never_in_one_process_and_a_killed_child_is_told(small: Dataset) -> None:
    libraries: list[str] = []

    def kill(progress: object) -> None:
        process = child()
        libraries.append(Path(f"/proc/{process.pid}/maps").read_text())
        process.kill()

    with pytest.raises(TrainingError, match=r"was killed by SIGKILL \(memory may have run out"):
        train_small(small, "seqcnn", on_progress=kill)
    assert "libpaddle" in libraries[0]
    assert "libtorch" not in libraries[0]
    ours = Path("/proc/self/maps").read_text()
    assert "libtorch" in ours
    assert "libpaddle" not in ours


def test_what_a_child_that_died_has_printed_is_told(
    small: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "paddle.py").write_text("import os, sys\nprint('to no one')\nsys.exit('disc on fire')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(TrainingError, match=r"ended with exit status 1.*It printed last: to no one\ndisc on fire"):
        train_small(small, "seqcnn")


def test_a_python_without_paddle_is_told_what_to_install(
    small: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "paddle.py").write_text("raise ImportError('no libpaddle here')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(TrainingError) as found:
        train_small(small, "seqcnn")
    assert "no libpaddle here" in str(found.value)
    assert "pip install 'millpond[paddle]'" in str(found.value)
    assert "MILLPOND_LEARN_PADDLE_PYTHON" in str(found.value)
    with pytest.raises(TrainingError, match="nowhere/python cannot be started"):
        train_small(small, "seqcnn", place=Place("cpu", Path("/nowhere/python")))


def test_before_any_data_is_read_paddle_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = LearnSettings(home=tmp_path)
    recipe = read_recipe(None, {"data": {"file": "/not/there.csv"}, **wanted("seqcnn")})

    def start(device: str) -> None:
        run(recipe, settings, device=device, name="x", out=None, report=lambda at: None)

    with pytest.raises(
        TrainingError, match=r"cannot use meta, which only torch sees\. Train as a job of the pool, with --lease"
    ):
        start("meta")
    with pytest.raises(DataError, match="not/there"):
        start("cpu")
    monkeypatch.setattr(fit_module, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"pip install 'millpond\[paddle\]'"):
        start("cpu")
    assert not (tmp_path / "runs").exists()


def wanted(architecture: str, **training: Any) -> dict[str, Any]:
    model = {"architecture": architecture, "options": SMALL.get(architecture, {})}
    return {"model": model, "training": {"framework": "paddle"} | training, "validation": 0.1}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (wanted("ngram"), r"the model ngram \(it can seqcnn and lstm\)"),
        (wanted("seqcnn", compile=True), "through torch.compile"),
        (wanted("seqcnn", precision="float16"), r"in float16.*\(it can bfloat16\)"),
        (wanted("seqcnn") | {"distil": {"teacher": "runs/x"}}, "with a teacher"),
        (wanted("seqcnn", framework="jax"), "Invalid enum value 'jax'"),
    ],
)
def test_what_paddle_cannot_follow_is_refused_with_the_recipe(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_recipe(None, {"data": {"corpus": "imdb"}} | changes)


def test_a_run_that_could_not_begin_leaves_no_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(100))
    recipe = read_recipe(None, {"data": {"file": str(data)}} | wanted("seqcnn"))
    settings = LearnSettings(home=tmp_path / "home", threads=1, paddle_python=Path("/bin/false"))
    with pytest.raises(TrainingError, match=r"Paddle \(/bin/false\) ended with exit status 1\.$"):
        run(recipe, settings, device="cpu", name="x", out=tmp_path / "runs/new", report=lambda at: None)
    assert not (tmp_path / "runs/new").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "place", "says"),
    [
        (HOW, Place("cuda"), "without CUDA and cannot train on cuda"),
        (TrainOptions(epochs=1, batch_size=50, learning_rate=0.01, precision="bfloat16"), Place("cpu"), "on GPUs only"),
        (TrainOptions(epochs=3, batch_size=50, learning_rate=1e30), Place("auto"), "is no longer a number: at step"),
    ],
)
def test_what_paddle_finds_out_is_told_as_torch_would(
    how: TrainOptions, place: Place, says: str, small: Dataset
) -> None:
    with pytest.raises(TrainingError, match=says):
        train_small(small, "seqcnn", how, place=place)


@pytest.mark.slow
def test_ctrl_c_keeps_the_best_so_far(small: Dataset) -> None:
    how = TrainOptions(epochs=1000, batch_size=50, learning_rate=0.01)
    result = train_small(small, "lstm", how, on_epoch=ctrl_c_at_epoch_1)
    assert result.interrupted
    assert 1 <= result.best <= len(result.epochs) < 1000


@pytest.mark.slow
def test_a_child_that_does_not_stop_at_ctrl_c_is_killed(small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is suspended, so that it cannot end in time however long the test's own process is kept waiting."""

    def interrupt(epoch: Epoch) -> None:
        if epoch.epoch == 1:
            child().suspend()
        ctrl_c_at_epoch_1(epoch)

    monkeypatch.setattr(parent, "STOP_S", 0.1)
    how = TrainOptions(epochs=1000, batch_size=50, learning_rate=0.01)
    with pytest.raises(TrainingError, match=r"did not stop within 0\.1 s of Ctrl-C and was killed"):
        train_small(small, "lstm", how, on_epoch=interrupt)


@pytest.mark.slow
def test_patience_ends_it_and_the_best_epoch_is_kept(small: Dataset) -> None:
    """Validation labels are the wrong way round, so the first epoch is the least bad one."""
    model, data, options = fresh(small, "seqcnn")
    how = TrainOptions(epochs=20, batch_size=50, learning_rate=0.01, patience=2)
    validation = (data, 1 - small.train.labels)
    given = {"place": Place("cpu"), "architecture": "seqcnn", "model_options": options, "seed": 0}
    result = train_in_paddle(model, data, small.train.labels, validation, how, **given)  # type: ignore[arg-type]
    assert (result.ended, result.best, len(result.epochs)) == ("early", 1, 3)
    probability = predict(model, data, CPU)[np.arange(len(data)), 1 - small.train.labels]
    assert -np.log(probability).mean() == pytest.approx(result.epochs[0].validation_loss, abs=1e-5)
    with pytest.raises(TrainingError, match="patience needs rows to validate on"):
        train_in_paddle(model, data, small.train.labels, None, how, **given)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", SMALL)
def test_a_model_trained_in_paddle_signs_and_serves_at_the_edge(architecture: str, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(500))
    recipe = read_recipe(None, {"data": {"file": str(data)}} | wanted(architecture, epochs=4, learning_rate=0.01))
    settings = LearnSettings(home=tmp_path / "home", threads=1)
    done = run(recipe, settings, device="cpu", name="x", out=tmp_path / "run", report=lambda at: None)
    assert done.evaluation.accuracy > 0.95
    assert done.summary()["trained_by"] == done.trained.training.trained_by
    assert re.search(r"PaddlePaddle 3\.\S+ on cpu", (tmp_path / "run/report.html").read_text())
    assert not (tmp_path / "run/checkpoints").exists()
    directory = tmp_path / "run/model"
    generate_key_pair(tmp_path / "key", tmp_path / "pub")
    sign(directory, tmp_path / "key")
    verify(directory, tmp_path / "pub")
    engine = Engine(directory, "sha256:" + "0" * 64, threads=1)
    engine.check_golden(directory)
    model, encoder, _ = read_model(directory)
    texts = done.dataset.test.texts[:30]
    expected = predict(model, Encoded.of(encoder, texts), CPU)
    assert engine.scores(texts) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_leaves_no_child_and_resume_ends_as_an_unbroken_run(tmp_path: Path) -> None:
    """With dropout, whose random numbers go on as if nothing had happened."""
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(500))
    environ = os.environ | {"MILLPOND_LEARN_THREADS": "1", "MILLPOND_LEARN_CHECKPOINT_S": "0.1"}
    options = "--model lstm --framework paddle --option embedding=16 --option width=16 --option hidden=16"
    options += " --option min_count=1 --epochs 8 --schedule cosine --clip-norm 1 --batch-size 16 --device cpu"
    command = [sys.executable, "-m", "millpond", "learn", "train", "--file", str(data), *options.split()]
    command += ["--validation", "0.1", "--json", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    without = environ | {"MILLPOND_LEARN_CHECKPOINT_S": "0"}
    subprocess.run([*command, str(whole)], env=without, check=True, capture_output=True, timeout=250)
    with subprocess.Popen([*command, str(killed)], env=environ, stdout=subprocess.DEVNULL) as process:
        kept = (killed / "checkpoints").glob
        wait_for(lambda: len(list(kept("0*.safetensors"))) > 1 or process.poll() is not None, 200)
        (its_child,) = psutil.Process(process.pid).children()
        process.kill()
    wait_for(lambda: not is_alive(its_child.pid), 200)
    assert list((killed / "checkpoints").glob("paddle-*"))  # what it could not delete
    done = subprocess.run(
        [*command, str(killed), "--resume"], env=environ, check=True, capture_output=True, timeout=250
    )
    assert json.loads(done.stdout)["resumed"] is not None
    weights = [(place / "model/weights.safetensors").read_bytes() for place in (whole, killed)]
    assert weights[0] == weights[1]
    assert not (killed / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_in_a_terminal_ends_the_child_too_and_writes_the_model(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", make_rows(500))
    options = "--model seqcnn --framework paddle --option min_count=1 --epochs 10000 --device cpu"
    command = [sys.executable, "-m", "millpond", "learn", "train", "--file", str(data), *options.split(), "--out"]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([*command, str(tmp_path / "run")], stdout=file, stderr=file, start_new_session=True)
    try:
        wait_for(lambda: "epoch 2" in log.read_text() or process.poll() is not None, 200)
        (its_child,) = psutil.Process(process.pid).children()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert not its_child.is_running()
    assert "Interrupted" in log.read_text()
    read_model(tmp_path / "run/model")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not os.environ.get("MILLPOND_DATA"), reason="MILLPOND_DATA does not say where IMDB lies")
def test_paddle_learns_imdb_as_well_as_torch(tmp_path: Path) -> None:
    """On a part of the training split, by the best epoch's accuracy on the 1,000 reviews held back of it."""
    settings = LearnSettings(home=tmp_path / "home", data=Path(os.environ["MILLPOND_DATA"]), threads=1)
    options = {"embedding": 32, "filters": 32, "max_words": 200, "min_count": 5}
    found = {}
    for framework in ("torch", "paddle"):
        given = {
            "data": {"corpus": "imdb-train"},
            "model": {"architecture": "seqcnn", "options": options},
            "training": {"framework": framework, "epochs": 2},
            "train_rows": 4000,
            "validation": 0.25,
        }
        recipe = read_recipe(None, given)
        done = run(recipe, settings, device="cpu", name="x", out=tmp_path / framework, report=lambda at: None)
        training = done.trained.training
        found[framework] = training.epochs[training.best - 1].validation_accuracy or 0.0
    assert found["paddle"] > 0.8
    assert found["paddle"] == pytest.approx(found["torch"], abs=0.04)
