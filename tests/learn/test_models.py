"""The models: what they compute, that batches do not matter, and that the exported graph answers alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch

from millpond.edge.engine import Engine
from millpond.learn.datasets import Dataset
from millpond.learn.encoded import Encoded
from millpond.learn.export import ExportError, build_graph, read_model, write_model
from millpond.learn.models import ModelError, TextModel, build, options_of, seqcnn
from millpond.learn.options import TrainOptions
from millpond.learn.train import complete, predict, train
from millpond.registry import Lineage, generate_key_pair, parse_config, sign, verify
from millpond.text import TextEncoder, pad

CPU = torch.device("cpu")
SMALL: dict[str, dict[str, Any]] = {
    "ngram": {"buckets": 4096, "min_count": 1},
    "seqcnn": {"embedding": 16, "filters": 24, "min_count": 1, "dropout": 0.0, "embedding_dropout": 0.0},
    "lstm": {"embedding": 16, "width": 12, "hidden": 8, "min_count": 1, "dropout": 0.0},
}


def trained(dataset: Dataset, architecture: str, epochs: int = 1) -> tuple[TextModel, TextEncoder]:
    options = options_of(architecture, SMALL[architecture])
    encoder = options.learn_encoder(dataset.train.texts)
    torch.manual_seed(0)
    model = build(architecture, options, encoder.rows, len(dataset.labels))
    data = Encoded.of(encoder, dataset.train.texts)
    model.prepare(data, dataset.train.labels)
    how = complete(TrainOptions(epochs=epochs, learning_rate=0.01), architecture, len(data))
    train(model, data, dataset.train.labels, None, how, CPU, seed=0)
    return model, encoder


def write(directory: Path, model: TextModel, encoder: TextEncoder, dataset: Dataset, architecture: str) -> Path:
    write_model(
        directory,
        model,
        encoder,
        architecture=architecture,
        options=options_of(architecture, SMALL[architecture]),
        name="small",
        version="v1",
        labels=dataset.labels,
        metrics={"test_accuracy": 0.5},
        data=[],
        lineage=Lineage(),
        sample_texts=dataset.test.texts[:8],
    )
    return directory


@pytest.mark.parametrize("architecture", SMALL)
@pytest.mark.parametrize("name", ["small", "three_labels"])
def test_the_directory_is_complete_signs_loads_and_its_graph_agrees(
    architecture: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    dataset: Dataset = request.getfixturevalue(name)
    model, encoder = trained(dataset, architecture)
    directory = write(tmp_path / "model", model, encoder, dataset, architecture)
    generate_key_pair(tmp_path / "key", tmp_path / "pub")
    sign(directory, tmp_path / "key")
    verify(directory, tmp_path / "pub")
    config = parse_config((directory / "config.json").read_bytes())
    assert config.labels == dataset.labels
    texts = [*dataset.test.texts[:40], "", "xyzzy"]
    expected = predict(model, Encoded.of(encoder, texts), CPU)
    # loaded again into torch
    loaded, its_encoder, _ = read_model(directory)
    assert predict(loaded, Encoded.of(its_encoder, texts), CPU) == pytest.approx(expected, abs=1e-6)
    # run as an edge runs it: one padded batch of texts of all lengths
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    (only_input,), (only_output,) = session.get_inputs(), session.get_outputs()
    assert (only_input.name, only_input.type, only_input.shape) == ("ids", "tensor(int64)", ["batch", "length"])
    assert (only_output.name, only_output.type) == ("logits", "tensor(float)")
    (logits,) = session.run(None, {"ids": pad(TextEncoder.from_dir(directory).encode(texts))})
    assert torch.from_numpy(logits).softmax(1).numpy() == pytest.approx(expected, abs=1e-5)
    Engine(directory, "sha256:" + "0" * 64, threads=1).check_golden(directory)
    golden = [json.loads(line) for line in (directory / "golden.jsonl").read_text().splitlines()]
    assert len(golden) == 12
    assert "" in [answer["text"] for answer in golden]
    assert max(len(answer["text"]) for answer in golden) == 100_000
    for answer in golden:
        assert sum(answer["scores"].values()) == pytest.approx(1)
        assert list(answer["scores"]) == dataset.labels


@pytest.mark.parametrize("architecture", SMALL)
def test_a_text_is_answered_alike_alone_and_in_any_batch(architecture: str, small: Dataset) -> None:
    model, encoder = trained(small, architecture)
    texts = ["great", "awful film " * 30, *small.test.texts[:20]]
    together = predict(model, Encoded.of(encoder, texts), CPU)
    alone = np.concatenate([predict(model, Encoded.of(encoder, [text]), CPU) for text in texts])
    assert together == pytest.approx(alone, abs=1e-6)


def test_the_lstm_reads_every_second_layer_backwards(small: Dataset) -> None:
    """With one layer a word changes only what follows it, with a second one also what stands before."""
    for layers, changes in ((1, False), (2, True)):
        options = options_of("lstm", SMALL["lstm"] | {"layers": layers})
        torch.manual_seed(0)
        model = build("lstm", options, 10, 2)
        last_lstm = model.get_submodule(f"lstms.{layers - 1}")
        made = {}
        for last in (4, 5):
            hook = last_lstm.register_forward_hook(lambda module, given, out: made.update({last: out[0].detach()}))  # noqa: B023
            model(torch.tensor([[1, 2, 3, last]]), 1)
            hook.remove()
        at = 3 if layers == 2 else 0  # the second layer's input is turned around: its last place is the first word
        assert bool((made[4][0, at] != made[5][0, at]).any()) == changes


def test_embeddings_of_seqcnn_start_with_the_log_count_ratio(small: Dataset) -> None:
    options = options_of("seqcnn", SMALL["seqcnn"])
    encoder = options.learn_encoder(small.train.texts)
    data = Encoded.of(encoder, small.train.texts)
    for prior, told in ((True, True), (False, False)):
        model = build("seqcnn", msgspec.structs.replace(options, prior=prior), encoder.rows, 2)
        model.prepare(data, small.train.labels)
        first = model.state_dict()["embedding.weight"][:, 0]
        great, awful = (float(first[encoder.encode([word])[0][0]]) for word in ("great", "awful"))
        assert (great > 1 and awful < -1) == told


@pytest.mark.parametrize(("texts", "known"), [(20, 2), (450, 3), (1500, 10), (60_000, 150)])
def test_seqcnn_knows_words_by_how_many_texts_there_are(texts: int, known: int) -> None:
    """One text has a word `known` times, and another once less."""
    some = [("often " * known + "seldom " * (known - 1)).strip(), *[""] * (texts - 1)]
    for option, words in (({}, ["often"]), ({"min_count": 1}, ["often", "seldom"])):
        encoder = options_of("seqcnn", option).learn_encoder(some)
        assert sorted(json.loads(encoder.tokenizer_json)["model"]["vocab"].keys() - {"[UNK]"}) == words


def test_the_windows_of_the_maxima_give_seqcnn_the_gradient_of_the_whole_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of one word and of many, and one that fills its batch: values and gradients agree."""
    torch.manual_seed(0)
    model = build("seqcnn", options_of("seqcnn", SMALL["seqcnn"]), 50, 3)
    ids = torch.randint(1, 50, (4, 9), dtype=torch.int32)
    ids[0, 1:], ids[1, 5:] = 0, 0
    found = []
    for few in (seqcnn.FEW_FILTERS, 0):
        monkeypatch.setattr(seqcnn, "FEW_FILTERS", few)
        model.zero_grad(set_to_none=True)
        logits = model(ids, len(ids))
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 1])))
        found.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert found[0][1].abs().sum() > 0  # of the embedding


def test_untrained_ngram_is_naive_bayes(small: Dataset) -> None:
    """With one label-telling word in each text, the log-count ratio alone tells them apart."""
    model, encoder = trained(small, "ngram", epochs=0)
    answers = predict(model, Encoded.of(encoder, small.test.texts), CPU).argmax(1)
    assert (answers == small.test.labels).mean() > 0.95


def test_the_ratio_is_that_of_the_paper() -> None:
    """Two texts, one bucketless unigram each: log((count + a) / norm) by hand."""
    options = options_of("ngram", {"min_count": 1, "max_ngram": 1, "buckets": 1, "smoothing": 1.0})
    encoder = TextEncoder.learn(["up", "down"], options.text_config(), min_count=1, max_vocabulary=10)
    model = build("ngram", options, encoder.rows, 2)
    model.prepare(Encoded.of(encoder, ["up", "down"]), np.array([1, 0]))
    up, down = (float(model.get_buffer("ratio_RK")[encoder.encode([word])[0][0]]) for word in ("up", "down"))
    norm = 1 + encoder.rows
    assert up == pytest.approx(np.log((2 / norm) / (1 / norm)))
    assert down == pytest.approx(-up)


def test_ngrams_that_training_has_not_seen_and_padding_weigh_nothing(small: Dataset) -> None:
    model, encoder = trained(small, "ngram", epochs=3)
    table = model.weights()["table"]
    seen = set(Encoded.of(encoder, small.train.texts).ids.tolist())
    unseen = [i for i in range(encoder.rows) if i not in seen]
    assert 0 in unseen
    assert not table[unseen].any()


@pytest.mark.parametrize(
    ("architecture", "options", "says"),
    [
        ("bert", {}, "no model 'bert'"),
        ("encoder", {}, "pretrained"),
        ("encoder", {"pretrained": "/nowhere/at all"}, "neither a directory nor in .* cache.*hf download"),
        ("ngram", {"bucket": 1}, "bucket.*It has: .*buckets"),
        ("ngram", {"buckets": "many"}, "Expected `int`"),
        ("ngram", {"max_ngram": 9}, "<= 5"),
        ("seqcnn", {"dropout": 1.0}, "< 1"),
    ],
)
def test_options_that_are_wrong_are_refused(architecture: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        options_of(architecture, options)


def test_options_fit_into_a_config() -> None:
    """config.json carries scalars only."""
    for architecture in SMALL:
        plain = msgspec.to_builtins(options_of(architecture, {}))
        assert all(isinstance(value, bool | int | float | str) for value in plain.values())


def test_a_graph_that_answers_otherwise_is_not_written(
    small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoder = trained(small, "ngram")
    other = build_graph(model)
    with torch.no_grad():
        model.get_parameter("bias_K").add_(1.0)
    monkeypatch.setattr("millpond.learn.export.build_graph", lambda model: other)
    with pytest.raises(ExportError, match="differs from the trained model"):
        write(tmp_path / "model", model, encoder, small, "ngram")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("damage", ["weights.safetensors", "config.json", "tokenizer.json"])
def test_a_directory_with_a_damaged_file_does_not_load(damage: str, small: Dataset, tmp_path: Path) -> None:
    from millpond import MillpondError

    model, encoder = trained(small, "ngram")
    directory = write(tmp_path / "model", model, encoder, small, "ngram")
    content = (directory / damage).read_bytes()
    for bad in (content[: len(content) // 2], b""):
        (directory / damage).write_bytes(bad)
        with pytest.raises(MillpondError):
            read_model(directory)


def test_weights_of_another_size_do_not_load(small: Dataset, three_labels: Dataset, tmp_path: Path) -> None:
    one = write(tmp_path / "one", *trained(small, "seqcnn"), small, "seqcnn")
    other = write(tmp_path / "other", *trained(three_labels, "seqcnn"), three_labels, "seqcnn")
    (one / "weights.safetensors").write_bytes((other / "weights.safetensors").read_bytes())
    with pytest.raises(ExportError, match="not a model that can be loaded"):
        read_model(one)
