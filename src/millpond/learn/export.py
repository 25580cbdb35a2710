"""The model directory: weights, graph, tokenizer, golden answers, config. What is written has been checked.

The graph is run by ONNX Runtime before it leaves: it must answer as the torch model does, and its answers are the
golden ones that an edge computes again before it serves the model. Signing and pushing are the registry's.
"""

from __future__ import annotations

import datetime
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import safetensors
import safetensors.torch
from numpy.typing import NDArray

import millpond
from millpond import MillpondError
from millpond.learn.encoded import Encoded
from millpond.learn.models import ModelOptions, TextModel, build, options_of
from millpond.learn.models.model import ONNX_OPSET
from millpond.learn.train import predict
from millpond.registry import DataSource, Lineage, ModelConfig, parse_config
from millpond.text import TextEncoder, pad

IR_VERSION = 10
"""ONNX 1.16 introduced it together with `ONNX_OPSET`."""
AGREEMENT = 1e-4
"""Largest difference between a probability of the graph and of the torch model."""
GOLDEN_TEXTS = 12
LONG_TEXT_CHARACTERS = 100_000


class ExportError(MillpondError):
    """A model cannot be written or read."""


class GoldenAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One line of golden.jsonl."""

    text: str
    scores: dict[str, float]


def write_model(
    directory: Path,
    model: TextModel,
    encoder: TextEncoder,
    *,
    architecture: str,
    options: ModelOptions,
    name: str,
    version: str,
    labels: Sequence[str],
    metrics: dict[str, float],
    data: Sequence[DataSource],
    lineage: Lineage,
    sample_texts: Sequence[str],
) -> ModelConfig:
    """Write an unsigned model directory, all of it or nothing; what was there before is replaced.

    Raises:
        ExportError: ONNX Runtime does not answer as the torch model does.
    """
    config = ModelConfig(
        name=name,
        version=version,
        labels=list(labels),
        architecture=architecture,
        options=msgspec.to_builtins(options),
        text=msgspec.to_builtins(encoder.config),
        floats_per_id=model.floats_per_id,
        metrics=metrics,
        data=list(data),
        lineage=lineage,
        code_version=millpond.__version__,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".model-") as temporary:
        new = Path(temporary) / "model"
        new.mkdir()
        graph = build_graph(model)
        answers = golden_answers(model, graph, encoder, labels, sample_texts)
        (new / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))
        (new / "tokenizer.json").write_text(encoder.tokenizer_json, encoding="utf-8")
        (new / "model.onnx").write_bytes(graph)
        (new / "golden.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(answers))
        safetensors.torch.save_file(model.weights(), new / "weights.safetensors")
        if directory.exists():
            shutil.rmtree(directory)
        new.rename(directory)
    return config


def read_model(directory: Path) -> tuple[TextModel, TextEncoder, ModelConfig]:
    """Load a model directory into torch, on the CPU.

    Raises:
        ExportError: a file is missing or does not fit the others.
        TextError: the tokenizer cannot be used.
        ArtifactInvalid: config.json is not what it must be.
    """
    try:
        config = parse_config((directory / "config.json").read_bytes())
        encoder = TextEncoder.from_dir(directory)
        model = build(
            config.architecture, options_of(config.architecture, config.options), encoder.rows, len(config.labels)
        )
        model.load_weights(safetensors.torch.load_file(directory / "weights.safetensors"))
    except (OSError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise ExportError(f"{directory} is not a model that can be loaded: {error}") from error
    model.eval()
    return model, encoder, config


def build_graph(model: TextModel) -> bytes:
    """Return the ONNX graph of a model: `ids` int64 [batch, length] to `logits` float32 [batch, labels]."""
    nodes, constants = model.onnx_nodes()
    helper = onnx.helper
    graph = helper.make_graph(
        nodes,
        "millpond",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", "labels"])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()],
    )
    opset = helper.make_opsetid("", ONNX_OPSET)
    made = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="millpond")
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString())


def golden_answers(
    model: TextModel, graph: bytes, encoder: TextEncoder, labels: Sequence[str], sample_texts: Sequence[str]
) -> list[GoldenAnswer]:
    """Answer a dozen texts with the graph, an empty and a very long one among them, and check them against torch.

    Raises:
        ExportError: an answer differs by more than `AGREEMENT`.
    """
    texts = list(sample_texts)[: GOLDEN_TEXTS - 4]
    long = " ".join(sample_texts) or "word "
    texts += ["", "?", "naïve 日本語 🙂 \u202eright to left", (long * (LONG_TEXT_CHARACTERS // len(long) + 1))]
    texts[-1] = texts[-1][:LONG_TEXT_CHARACTERS]
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    found = np.concatenate([_answer(session, encoder, text) for text in texts])
    device = next(model.parameters()).device
    expected = predict(model, Encoded.of(encoder, texts), device)
    difference = float(np.abs(found - expected).max())
    if not difference <= AGREEMENT:  # NaN is not within it either
        raise ExportError(
            f"the exported graph differs from the trained model by {difference:.2g} (at most {AGREEMENT:g} is right); "
            "the model was not written. This is a defect of Millpond or of ONNX Runtime: please report it."
        )
    return [
        GoldenAnswer(text=text, scores=dict(zip(labels, row.tolist(), strict=True)))
        for text, row in zip(texts, found, strict=True)
    ]


def _answer(session: onnxruntime.InferenceSession, encoder: TextEncoder, text: str) -> NDArray[np.float64]:
    (logits,) = session.run(["logits"], {"ids": pad(encoder.encode([text]))})
    exponent = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    scores: NDArray[np.float64] = exponent / exponent.sum(1, keepdims=True)
    return scores
