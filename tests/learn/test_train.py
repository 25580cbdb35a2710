"""The loop: repeats for a seed, reads the device rarely, keeps the best, stops when asked or when it must."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from millpond.learn import train as train_module
from millpond.learn.datasets import Dataset
from millpond.learn.encoded import Encoded
from millpond.learn.models import TextModel, build, options_of
from millpond.learn.options import TrainingError, TrainOptions, rate_at
from millpond.learn.progress import Epoch, Progress
from millpond.learn.train import complete, predict, train
from millpond.text import TextEncoder

CPU = torch.device("cpu")
SEQCNN = {"embedding": 16, "filters": 24, "min_count": 1}
NGRAM = {"buckets": 4096, "min_count": 1}


def fresh(dataset: Dataset, architecture: str = "ngram", **options: object) -> tuple[TextModel, Encoded, TextEncoder]:
    made = options_of(architecture, {**(NGRAM if architecture == "ngram" else SEQCNN), **options})
    encoder = TextEncoder.learn(dataset.train.texts, made.text_config(), min_count=1, max_vocabulary=1000)
    torch.manual_seed(3)
    model = build(architecture, made, encoder.rows, len(dataset.labels))
    data = Encoded.of(encoder, dataset.train.texts)
    model.prepare(data, dataset.train.labels)
    return model, data, encoder


def options(**given: object) -> TrainOptions:
    return TrainOptions(**({"epochs": 2, "batch_size": 50, "learning_rate": 0.01} | given))  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["ngram", "seqcnn"])
@pytest.mark.parametrize("name", ["small", "three_labels"])
def test_both_models_learn_two_labels_and_more(architecture: str, name: str, request: pytest.FixtureRequest) -> None:
    dataset: Dataset = request.getfixturevalue(name)
    model, data, encoder = fresh(dataset, architecture)
    how = options(epochs=4)
    result = train(model, data, dataset.train.labels, None, how, CPU, seed=0)
    answers = predict(model, Encoded.of(encoder, dataset.test.texts), CPU).argmax(1)
    assert (answers == dataset.test.labels).mean() > 0.95
    assert result.epochs[-1].loss < result.epochs[0].loss
    assert result.best == 4


@pytest.mark.parametrize("architecture", ["ngram", "seqcnn"])
def test_the_same_seed_gives_the_same_weights(architecture: str, small: Dataset) -> None:
    tables = []
    for seed in (1, 1, 2):
        model, data, _ = fresh(small, architecture)
        train(model, data, small.train.labels, None, options(), CPU, seed=seed)
        tables.append(torch.cat([tensor.flatten() for tensor in model.weights().values()]))
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_the_epoch_that_was_best_on_validation_is_kept(small: Dataset) -> None:
    """Validation labels are the wrong way round, so the first epoch is the least bad one."""
    model, data, encoder = fresh(small)
    held = Encoded.of(encoder, small.test.texts)
    result = train(model, data, small.train.labels, (held, 1 - small.test.labels), options(epochs=4), CPU, seed=0)
    losses = [epoch.validation_loss for epoch in result.epochs]
    assert result.best == 1
    assert losses == sorted(losses)  # type: ignore[type-var]
    probability = predict(model, held, CPU)[np.arange(len(held)), 1 - small.test.labels]
    assert -np.log(probability).mean() == pytest.approx(losses[0], abs=1e-5)


def test_ctrl_c_keeps_the_best_so_far(small: Dataset) -> None:
    model, data, encoder = fresh(small)
    validation = (Encoded.of(encoder, small.test.texts), small.test.labels)
    seen: list[Progress] = []

    def interrupt(at: Progress) -> None:
        seen.append(at)
        if at.epoch == 3:
            raise KeyboardInterrupt

    result = train(model, data, small.train.labels, validation, options(epochs=50), CPU, seed=0, on_progress=interrupt)
    assert result.interrupted
    assert [epoch.epoch for epoch in result.epochs] == [1, 2]
    answers = predict(model, validation[0], CPU)
    truth = answers[np.arange(len(answers)), small.test.labels]
    kept = result.epochs[result.best - 1].validation_loss
    assert -np.log(truth).mean() == pytest.approx(kept, abs=1e-5)


def test_ctrl_c_without_validation_keeps_the_unfinished_epoch(small: Dataset) -> None:
    model, data, _ = fresh(small)

    def interrupt(at: Progress) -> None:
        if at.epoch == 3:
            raise KeyboardInterrupt

    result = train(model, data, small.train.labels, None, options(epochs=9), CPU, seed=0, on_progress=interrupt)
    assert (result.interrupted, result.best, len(result.epochs)) == (True, 0, 2)
    assert not model.training


def test_a_step_reads_nothing_from_the_device(small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device behind a network each read waits for all before it."""
    monkeypatch.setattr(train_module, "REPORT_EVERY_S", 1e9)
    reads = []
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counting(tensor: torch.Tensor, *args: object, original: object = original, name: str = name) -> object:
            # Adam counts its steps in tensors of the host, whatever the device.
            if "torch/optim" not in sys._getframe(1).f_code.co_filename:
                reads.append(name)
            return original(tensor, *args)  # type: ignore[operator]

        monkeypatch.setattr(torch.Tensor, name, counting)
    for architecture in ("ngram", "seqcnn"):
        model, data, _ = fresh(small, architecture)
        reads.clear()
        train(model, data, small.train.labels, None, options(epochs=3, batch_size=20), CPU, seed=0)
        assert reads == ["tolist"] * 3, architecture


def test_progress_counts_texts_and_ends_at_the_last_step(small: Dataset) -> None:
    model, data, _ = fresh(small)
    seen: list[Progress] = []
    train(model, data, small.train.labels, None, options(batch_size=64), CPU, seed=0, on_progress=seen.append)
    assert (seen[-1].epoch, seen[-1].step, seen[-1].steps) == (2, 7, 7)
    assert seen[-1].accuracy > 0.9
    assert seen[-1].texts_per_s > 0


def test_a_loss_that_is_no_number_ends_training_with_advice(small: Dataset) -> None:
    model, data, _ = fresh(small, "seqcnn")
    with pytest.raises(TrainingError, match="Lower the learning rate") as caught:
        train(model, data, small.train.labels, None, options(learning_rate=1e30), CPU, seed=0)
    for said in ("at step 2 of epoch 1", "the learning rate was 1e+30", "--learning-rate 1e+29", "--clip-norm 1"):
        assert said in str(caught.value)


@pytest.mark.parametrize("validated", [False, True])
def test_a_loss_that_is_no_number_later_keeps_the_best_epoch(small: Dataset, validated: bool) -> None:
    """A weight becomes NaN in the third epoch."""
    model, data, encoder = fresh(small, "seqcnn", dropout=0.0)
    held = (Encoded.of(encoder, small.test.texts), small.test.labels) if validated else None
    kept: list[torch.Tensor] = []
    weight = model.get_parameter("linear.weight")

    def poison(epoch: Epoch) -> None:
        kept.append(weight.detach().clone())
        if epoch.epoch == 2:
            model.register_forward_pre_hook(spoil)

    def spoil(*_: object) -> None:
        if model.training:
            with torch.no_grad():
                weight[0, 0] = torch.nan

    result = train(model, data, small.train.labels, held, options(epochs=5), CPU, seed=0, on_epoch=poison)
    assert (result.ended, len(result.epochs)) == ("diverged", 2)
    assert "the loss is no longer a number: at step 1 of epoch 3" in result.error
    assert torch.equal(model.get_parameter("linear.weight"), kept[result.best - 1])


def test_weights_that_are_no_numbers_after_the_last_step_are_no_success(small: Dataset) -> None:
    """The loss of the only step is fine; what the step leaves is not."""
    model, data, _ = fresh(small, "seqcnn")
    how = options(epochs=1, batch_size=400)
    model.get_parameter("linear.bias").register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingError, match="a weight is no longer a number"):
        train(model, data, small.train.labels, None, how, CPU, seed=0)


def test_training_stops_when_validation_gets_no_better(small: Dataset) -> None:
    """Validation labels are the wrong way round, so each epoch is worse than the first."""
    model, data, encoder = fresh(small)
    held = (Encoded.of(encoder, small.test.texts), 1 - small.test.labels)
    result = train(model, data, small.train.labels, held, options(epochs=50, patience=2), CPU, seed=0)
    assert (result.ended, result.best, len(result.epochs)) == ("early", 1, 3)
    losses = -np.log(predict(model, held[0], CPU)[np.arange(len(held[1])), held[1]]).mean()
    assert losses == pytest.approx(result.epochs[0].validation_loss, abs=1e-5)


def test_patience_without_validation_is_refused(small: Dataset) -> None:
    model, data, _ = fresh(small)
    with pytest.raises(TrainingError, match="set --validation above 0"):
        train(model, data, small.train.labels, None, options(patience=2), CPU, seed=0)


def test_the_learning_rate_warms_up_and_falls() -> None:
    def rates(schedule: str, warmup: float) -> list[float]:
        how = options(learning_rate=1.0, schedule=schedule, warmup=warmup)
        return [round(rate_at(step, 10, how), 4) for step in range(10)]

    assert rates("constant", 0.0) == [1.0] * 10
    assert rates("constant", 0.4) == [0.25, 0.5, 0.75] + [1.0] * 7
    assert rates("linear", 0.0) == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert rates("linear", 0.2)[:3] == [0.5, 1.0, 1.0]
    assert rates("cosine", 0.0)[5] == 0.5
    assert rates("cosine", 0.0)[-1] == round((1 + math.cos(math.pi * 0.9)) / 2, 4)


def test_the_schedule_reaches_the_optimizer(small: Dataset) -> None:
    model, data, _ = fresh(small)
    how = options(epochs=4, schedule="linear", warmup=0.1)
    result = train(model, data, small.train.labels, None, how, CPU, seed=0)
    assert [epoch.learning_rate for epoch in result.epochs] == [
        pytest.approx(rate_at(8 * epoch - 1, 32, how)) for epoch in (1, 2, 3, 4)
    ]


def test_only_gradients_that_are_too_long_are_clipped(small: Dataset) -> None:
    tables = []
    for clip_norm in (0.0, 1e9, 1e-3):
        model, data, _ = fresh(small)
        train(model, data, small.train.labels, None, options(clip_norm=clip_norm), CPU, seed=0)
        tables.append(model.weights()["table"])
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns_and_leaves_float32(small: Dataset, precision: str) -> None:
    model, data, encoder = fresh(small, "seqcnn")
    seen = set()
    model.convolutions[0].register_forward_hook(lambda *found: seen.add(found[2].dtype))  # type: ignore[index,union-attr]
    train(model, data, small.train.labels, None, options(epochs=4, precision=precision), CPU, seed=0)
    assert seen == {getattr(torch, precision)}
    assert {tensor.dtype for tensor in model.weights().values()} == {torch.float32}
    answers = predict(model, Encoded.of(encoder, small.test.texts), CPU).argmax(1)
    assert (answers == small.test.labels).mean() > 0.95


def test_batches_by_length_learn_as_well_with_less_padding(small: Dataset) -> None:
    shares = []
    for by_length in (False, True):
        model, data, encoder = fresh(small, "seqcnn")
        how = options(epochs=4, batch_size=20, by_length=by_length)
        result = train(model, data, small.train.labels, None, how, CPU, seed=0)
        shares.append(result.epochs[-1].padding)
        answers = predict(model, Encoded.of(encoder, small.test.texts), CPU).argmax(1)
        assert (answers == small.test.labels).mean() > 0.95
    assert shares[0] > 0.3
    assert shares[1] < 0.1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_compiled_step_learns_the_same_and_one_that_cannot_be_compiled_says_so(
    small: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo traces for real; in the place of its C++ is what it traced, and then a compiler that is missing."""
    losses = []
    compiler = torch.compile
    for backend in (None, "eager"):
        monkeypatch.setattr(
            torch, "compile", lambda *what, backend=backend, **how: compiler(*what, backend=backend, **how)
        )
        model, data, _ = fresh(small, "seqcnn", dropout=0.0)
        result = train(model, data, small.train.labels, None, options(compile=bool(backend)), CPU, seed=0)
        losses.append([epoch.loss for epoch in result.epochs])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def no_compiler(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda *what, **how: compiler(*what, backend=no_compiler, **how))
    with pytest.raises(TrainingError, match=r"no C\+\+ compiler.*Train without --compile"):
        train(model, data, small.train.labels, None, options(compile=True), CPU, seed=0)


COMPILED = """
import numpy as np, torch
from millpond.learn.encoded import Encoded
from millpond.learn.models import build, options_of
from millpond.learn.train import TrainOptions, train
torch.set_num_threads(2)
options = options_of("seqcnn", {"min_count": 1})
rng = np.random.default_rng(0)
labels = np.arange(64) % 2
texts = [" ".join(f"w{word}" for word in rng.integers(20 * label, 20 * label + 30, 307)) for label in labels]
encoder = options.learn_encoder(texts)
model = build("seqcnn", options, encoder.rows, 2)
how = TrainOptions(epochs=4, batch_size=32, learning_rate=0.01, compile=True)
print(train(model, Encoded.of(encoder, texts), labels, None, how, torch.device("cpu"), seed=0).epochs[-1].accuracy)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_seqcnn_at_its_own_size_learns_compiled_on_two_threads() -> None:
    """In a process of its own: Inductor's gradient of an embedding behind dropout and a transpose ends it (log.md)."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) > 0.95


def test_a_model_that_pads_nothing_has_no_padding(small: Dataset) -> None:
    model, data, _ = fresh(small)
    assert train(model, data, small.train.labels, None, options(), CPU, seed=0).epochs[0].padding == 0.0


def test_few_rows_get_small_batches_unless_one_is_given() -> None:
    assert complete(TrainOptions(), "ngram", 25_000).batch_size == 1024
    assert complete(TrainOptions(), "ngram", 1600).batch_size == 100
    assert complete(TrainOptions(), "ngram", 2).batch_size == 4
    assert complete(TrainOptions(batch_size=512), "ngram", 10).batch_size == 512


def test_batches_of_any_length_are_answered_in_the_order_given(small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, _ = fresh(small)
    whole = predict(model, data, CPU)
    monkeypatch.setattr(train_module, "EVALUATION_FLOATS", 2000)
    assert predict(model, data, CPU) == pytest.approx(whole, abs=1e-6)


def test_encoded_texts_are_taken_and_padded_as_one_by_one(small: Dataset) -> None:
    _, data, encoder = fresh(small)
    rows = encoder.encode(small.train.texts)
    index = np.array([5, 3, 3, 399, 0])
    taken = data.take(index)
    assert [taken.ids[a:b].tolist() for a, b in zip(taken.starts, taken.starts[1:], strict=False)] == [
        rows[i].tolist() for i in index
    ]
    for row, i in zip(taken.padded(), index, strict=True):
        assert row[: len(rows[i])].tolist() == rows[i].tolist()
        assert not row[len(rows[i]) :].any()
    assert np.bincount(taken.with_rows()[0]).tolist() == [len(rows[i]) for i in index]
