"""`seqcnn` and `lstm` in Paddle: the same computation, the same names of weights as `millpond.learn.models` has.

Sizes are read off the weights. A linear layer's weight lies transposed in Paddle; everything else, the order of an
LSTM's gates included, lies as in torch. Ops are such as `paddle2onnx` knows (no `masked_fill`, `pad`, `arange`, `zip`).

Shape suffixes: B texts, L words of the longest, E embedding, F filters, W width of a linear map, H of an LSTM,
C labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import nn
from paddle.nn import functional

from millpond.learn.paddle.messages import Architecture

Weights = Mapping[str, NDArray[np.float32]]
"""By torch's names, in torch's layouts."""


class SeqCnn(nn.Layer):
    """Embedding, two convolutions over the words, ELU, maximum over time, linear."""

    def __init__(self, weights: Weights, dropout: float, embedding_dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(*weights["embedding.weight"].shape, padding_idx=0)
        shapes = [weights[f"convolutions.{i}.weight"].shape for i in _numbers(weights, "convolutions.{}.weight")]
        self.convolutions = nn.LayerList(
            [nn.Conv1D(size, filters, width, padding=[width // 2, (width - 1) // 2]) for filters, size, width in shapes]
        )
        self.dropout = nn.Dropout(dropout)
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.linear = nn.Linear(*weights["linear.weight"].shape[::-1])
        load(self, weights)

    def forward(self, ids: paddle.Tensor) -> paddle.Tensor:
        """Return logits [B, C] of ids [B, L]."""
        x_BEL = self.embedding_dropout(self.embedding(ids)).transpose([0, 2, 1])
        ended_B1L = (ids == 0).unsqueeze(1)
        pooled = [functional.elu(_highest(convolve(x_BEL), ended_B1L, 2)) for convolve in self.convolutions]
        return self.linear(self.dropout(paddle.concat(pooled, 1)))


class Lstm(nn.Layer):
    """Embedding, layers of a linear map and an LSTM, every second one reading backwards; maximum; linear."""

    def __init__(self, weights: Weights, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(*weights["embedding.weight"].shape, padding_idx=0)
        shapes = [weights[f"maps.{i}.weight"].shape for i in _numbers(weights, "maps.{}.weight")]
        hidden = weights["lstms.0.weight_hh_l0"].shape[1]
        self.maps = nn.LayerList([nn.Linear(below, width) for width, below in shapes])
        self.lstms = nn.LayerList([nn.LSTM(width, hidden) for width, _ in shapes])
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(*weights["linear.weight"].shape[::-1])
        load(self, weights)

    def forward(self, ids: paddle.Tensor) -> paddle.Tensor:
        """Return logits [B, C] of ids [B, L]."""
        ended_BL1 = (ids == 0).unsqueeze(2)
        place_BL = paddle.ones_like(ids).astype("int64").cumsum(1) - 1
        length_B1 = (ids != 0).astype("int64").sum(1, keepdim=True)
        back_BL1 = paddle.where(place_BL < length_B1, length_B1 - 1 - place_BL, place_BL).unsqueeze(2)
        x_BLX = self.embedding(ids)
        for number, linear in enumerate(self.maps):
            x_BLW, lstm = linear(x_BLX), self.lstms[number]
            if number % 2 == 0:
                y_BLH = lstm(x_BLW)[0]
            else:
                y_BLH = _turned(lstm(_turned(x_BLW, back_BL1))[0], back_BL1)
            x_BLX = paddle.concat([x_BLW, y_BLH], 2)
        return self.linear(self.dropout(_highest(x_BLX, ended_BL1, 1)))


def build(architecture: Architecture, weights: Weights, dropout: float, embedding_dropout: float) -> nn.Layer:
    """Make a model with these weights.

    Raises:
        KeyError: a weight is missing.
    """
    return SeqCnn(weights, dropout, embedding_dropout) if architecture == "seqcnn" else Lstm(weights, dropout)


def load(model: nn.Layer, weights: Weights) -> None:
    """Take weights in torch's layouts."""
    for name, parameter in model.named_parameters():
        parameter.set_value(np.ascontiguousarray(weights[name].T if name in _transposed(model) else weights[name]))


def weights_of(model: nn.Layer) -> dict[str, NDArray[np.float32]]:
    """Return a copy of the weights, in torch's layouts."""
    arrays = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    turned = _transposed(model)
    return {name: np.array(array.T if name in turned else array, order="C") for name, array in arrays.items()}


def _transposed(model: nn.Layer) -> set[str]:
    return {f"{name}.weight" for name, layer in model.named_sublayers() if isinstance(layer, nn.Linear)}


def _numbers(weights: Weights, name: str) -> list[int]:
    """Return 0, 1, … as long as there is a weight of that number."""
    return list(takewhile(lambda number: name.format(number) in weights, count()))


def _highest(x: paddle.Tensor, ended: paddle.Tensor, axis: int) -> paddle.Tensor:
    """Return the maxima along an axis, but of what has ended; the gradient of equal ones goes to one, as in torch.

    Windows with the same words are equal. Paddle's `max` shares the gradient out among them, and takes five times as
    long in a step on the CPU.
    """
    lowest = paddle.full([], -np.inf, x.dtype)
    return paddle.topk(paddle.where(ended, lowest, x), 1, axis)[0].squeeze(axis)


def _turned(x: paddle.Tensor, back_BL1: paddle.Tensor) -> paddle.Tensor:
    """Return each text backwards, its padding where it was."""
    wide = back_BL1 + paddle.zeros_like(x, "int64")  # `expand` would reach ONNX with a shape that does not change
    return paddle.take_along_axis(x, wide, 1, broadcast=False)
