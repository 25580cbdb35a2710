"""Seq-CNN: embedding, two convolutions over the words, ELU, maximum over time, linear.

Johnson and Zhang, "Effective Use of Word Order", 2014, in the form of the MLPerf Training sentiment reference
(embedding 1024, widths 3 and 4, 1024 filters each).

Shape suffixes: B texts, L words of the longest, E embedding, F filters, W words of a window, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import onnx
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from millpond.learn.encoded import Encoded
from millpond.learn.models.model import TextModel, VocabularyOptions
from millpond.learn.models.ratio import log_count_ratio
from millpond.text import TextConfig, TextEncoder

WIDTHS = (3, 4)
"""Words under each convolution, as in the reference."""
PRIOR_SMOOTHING = 8.0
"""Added to each count before the ratio is taken, as in the n-gram model."""
TEXTS_A_COUNT = 150
"""A word must be seen once in so many training texts, ..."""
COUNTS = (2, 150)
"""... and between so many times: a model that knows rare words learns names by heart (docs/log.md)."""
FEW_FILTERS = 512
"""Up to so many, a CPU learns from the windows of the maxima alone; beyond, these would be larger than the texts."""


class SeqCnnOptions(VocabularyOptions, frozen=True, kw_only=True):
    """The defaults suit a CPU (docs/log.md); docs/reference/recipe.md lists the reference's."""

    embedding: Annotated[int, Meta(ge=1, le=8192)] = 64
    filters: Annotated[int, Meta(ge=1, le=8192)] = 96
    min_count: Annotated[int, Meta(ge=0)] = 0
    """Times a word must be seen in training to be known; 0: as many as follow from the number of texts."""
    max_words: Annotated[int, Meta(ge=1, le=100_000)] = 512
    last_words: Annotated[int, Meta(ge=0, le=100_000)] = 128
    """How many of `max_words`, half of them at most, are the last words of a longer text."""
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.5
    """Of the filters' maxima, before the last layer."""
    embedding_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.3
    """Of each number of a word's embedding."""
    prior: bool = True
    """Whether embeddings start with naive Bayes' log-count ratio of their word in the first numbers, not by chance."""

    def learn_encoder(self, texts: Sequence[str]) -> TextEncoder:
        """Return an encoder with the vocabulary of `texts`."""
        least, most = COUNTS
        min_count = self.min_count or min(max(len(texts) // TEXTS_A_COUNT, least), most)
        return TextEncoder.learn(texts, self.text_config(), min_count=min_count, max_vocabulary=self.max_vocabulary)

    def text_config(self) -> TextConfig:
        """Return how texts become ids for this model."""
        last_words = min(self.last_words, self.max_words // 2)
        return TextConfig(features="words", max_words=self.max_words, last_words=last_words)


class SeqCnn(TextModel):
    """A text's logits do not depend on the other texts of its batch: padding is zero and never the maximum."""

    def __init__(self, options: SeqCnnOptions, rows: int, labels: int) -> None:
        super().__init__()
        self.columns = 1 if labels == 2 else labels
        self.filters = options.filters
        self.floats_per_id = options.embedding + options.filters * len(WIDTHS)
        self.embedding = nn.Embedding(rows, options.embedding, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(options.embedding, options.filters, width) for width in WIDTHS)
        self.dropout = nn.Dropout(options.dropout)
        self.embedding_dropout = nn.Dropout(options.embedding_dropout)
        self.prior_columns = min(self.columns, options.embedding) if options.prior else 0
        self.linear = nn.Linear(options.filters * len(WIDTHS), labels)
        nn.init.normal_(self.embedding.weight, std=0.1)
        with torch.no_grad():
            self.embedding.weight[0] = 0.0

    def prepare(self, data: Encoded, labels: NDArray[np.int64]) -> None:
        """Let the embeddings begin with what counting tells of each word."""
        if self.prior_columns:
            ratio_RK = log_count_ratio(data, labels, (self.embedding.num_embeddings, self.columns), PRIOR_SMOOTHING)
            with torch.no_grad():
                self.embedding.weight[:, : self.prior_columns] = torch.from_numpy(ratio_RK[:, : self.prior_columns])

    @staticmethod
    def batch(data: Encoded) -> NDArray[np.int32]:
        """Return what `forward` takes for these texts, as one array [B, L]: ids, 0 where a text has ended."""
        return data.padded()

    def forward(self, batch: Tensor, texts: int) -> Tensor:
        """Return logits [texts, labels] of a batch."""
        id_BL = batch.long()
        x_BLE = self.embedding_dropout(self.embedding(id_BL))
        ended_BL = id_BL == 0
        by_windows = torch.is_grad_enabled() and x_BLE.device.type == "cpu" and self.filters <= FEW_FILTERS
        highest = _highest_by_windows if by_windows else _highest
        # ELU is monotone, so it may follow the maximum: it then costs a row, not a text.
        pooled = [
            functional.elu(highest(x_BLE, ended_BL, convolution, width))
            for width, convolution in zip(WIDTHS, self.convolutions, strict=True)
        ]
        logits_BC: Tensor = self.linear(self.dropout(torch.cat(pooled, 1)))
        return logits_BC

    def onnx_nodes(self) -> tuple[list[onnx.NodeProto], dict[str, NDArray[np.generic]]]:
        """Return the nodes that lead from `ids` [texts, longest] to `logits`, and the constants they use."""
        make = onnx.helper.make_node
        constants: dict[str, NDArray[np.generic]] = {name: tensor.numpy() for name, tensor in self.weights().items()}
        constants |= {"zero": np.array(0), "lowest": np.array(-np.inf, np.float32), "axis1": np.array([1])}
        constants["axis2"] = np.array([2])
        nodes = [
            make("Gather", ["embedding.weight", "ids"], ["embedded"]),
            make("Transpose", ["embedded"], ["x"], perm=[0, 2, 1]),
            make("Equal", ["ids", "zero"], ["is_padding"]),
            make("Unsqueeze", ["is_padding", "axis1"], ["ended"]),
        ]
        for i, width in enumerate(WIDTHS):
            weight, bias = f"convolutions.{i}.weight", f"convolutions.{i}.bias"
            nodes += [
                make("Conv", ["x", weight, bias], [f"y{i}"], pads=[width // 2, (width - 1) // 2]),
                make("Where", ["ended", "lowest", f"y{i}"], [f"alive{i}"]),
                make("ReduceMax", [f"alive{i}", "axis2"], [f"highest{i}"], keepdims=0),
                make("Elu", [f"highest{i}"], [f"pooled{i}"]),
            ]
        nodes += [
            make("Concat", [f"pooled{i}" for i in range(len(WIDTHS))], ["features"], axis=1),
            make("Gemm", ["features", "linear.weight", "linear.bias"], ["logits"], transB=1),
        ]
        return nodes, constants


def _convolved(x_BLE: Tensor, ended_BL: Tensor, convolution: nn.Module, width: int) -> Tensor:
    """Return one value a word and filter [B, F, L], lowest where the text has ended."""
    y_BFL: Tensor = convolution(_padded(x_BLE, width).transpose(1, 2))
    return y_BFL.masked_fill(ended_BL.unsqueeze(1), -torch.inf)


def _highest(x_BLE: Tensor, ended_BL: Tensor, convolution: nn.Module, width: int) -> Tensor:
    """Return the maximum over time [B, F]."""
    # `max` also knows where it was, which makes its gradient cheaper than that of `amax`.
    return _convolved(x_BLE, ended_BL, convolution, width).max(2).values


def _highest_by_windows(x_BLE: Tensor, ended_BL: Tensor, convolution: nn.Module, width: int) -> Tensor:
    """Return the same, with a gradient that costs a sixth: only the window of each maximum has one.

    The places are looked for without a gradient; the windows there are multiplied once more, with one.
    """
    with torch.no_grad():
        at_BF = _convolved(x_BLE, ended_BL, convolution, width).argmax(2)
    padded_BLE = _padded(x_BLE, width)
    texts, length, size = padded_BLE.shape
    first_B11 = (torch.arange(texts) * length).view(-1, 1, 1)
    row_BFW = first_B11 + at_BF.unsqueeze(2) + torch.arange(width)
    window_BFWE = padded_BLE.flatten(0, 1).index_select(0, row_BFW.flatten()).view(*row_BFW.shape, size)
    weight_FEW, bias_F = convolution.parameters()
    return (window_BFWE * weight_FEW.transpose(1, 2)).sum((2, 3)) + bias_F


def _padded(x_BLE: Tensor, width: int) -> Tensor:
    """Return the words with room for the windows at both ends (context_start = -width // 2, as in the reference)."""
    return functional.pad(x_BLE, (0, 0, width // 2, (width - 1) // 2))
