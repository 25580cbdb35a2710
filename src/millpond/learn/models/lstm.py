"""Stacked LSTM: embedding, then layers of a linear map and an LSTM, every second one reading backwards; maximum.

The second model of the MLPerf Training sentiment reference (PaddlePaddle's `stacked_lstm_net`: embedding 128, 512 wide,
LSTMs of 128, three layers), without the peepholes of its cells, which neither cuDNN nor ONNX Runtime's fast path has.

Shape suffixes: B texts, L words of the longest, E embedding, W width of a linear map, H of an LSTM, C labels.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import onnx
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor, nn

from millpond.learn.encoded import Encoded
from millpond.learn.models.model import TextModel, VocabularyOptions
from millpond.text import TextConfig


class LstmOptions(VocabularyOptions, frozen=True, kw_only=True):
    """The defaults suit a CPU; the reference's are embedding 128, width 512, hidden 128, no dropout."""

    embedding: Annotated[int, Meta(ge=1, le=8192)] = 64
    width: Annotated[int, Meta(ge=1, le=8192)] = 64
    """Of the linear map before each LSTM."""
    hidden: Annotated[int, Meta(ge=1, le=8192)] = 64
    layers: Annotated[int, Meta(ge=1, le=16)] = 3
    min_count: Annotated[int, Meta(ge=1)] = 20
    max_words: Annotated[int, Meta(ge=1, le=100_000)] = 256
    last_words: Annotated[int, Meta(ge=0, le=100_000)] = 0
    """How many of `max_words`, half of them at most, are the last words of a longer text."""
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.3

    def text_config(self) -> TextConfig:
        """Return how texts become ids for this model."""
        last_words = min(self.last_words, self.max_words // 2)
        return TextConfig(features="words", max_words=self.max_words, last_words=last_words)


class Lstm(TextModel):
    """A text's logits do not depend on its padding: that is read last, and is never the maximum."""

    def __init__(self, options: LstmOptions, rows: int, labels: int) -> None:
        super().__init__()
        width, hidden = options.width, options.hidden
        self.floats_per_id = options.embedding + 2 * width + 6 * hidden
        self.embedding = nn.Embedding(rows, options.embedding, padding_idx=0)
        below = [options.embedding, *[width + hidden] * (options.layers - 1)]
        self.maps = nn.ModuleList(nn.Linear(size, width) for size in below)
        self.lstms = nn.ModuleList(nn.LSTM(width, hidden, batch_first=True) for _ in below)
        self.dropout = nn.Dropout(options.dropout)
        self.linear = nn.Linear(width + hidden, labels)
        nn.init.normal_(self.embedding.weight, std=0.1)
        with torch.no_grad():
            self.embedding.weight[0] = 0.0
            for lstm in self.lstms:
                lstm.get_parameter("bias_ih_l0")[hidden : 2 * hidden] = 1.0  # remember first (Gers et al. 2000)

    def prepare(self, data: Encoded, labels: NDArray[np.int64]) -> None:
        """Do nothing: this model learns by its gradient alone."""

    @staticmethod
    def batch(data: Encoded) -> NDArray[np.int32]:
        """Return what `forward` takes for these texts, as one array [B, L]: ids, 0 where a text has ended."""
        return data.padded()

    def forward(self, batch: Tensor, texts: int) -> Tensor:
        """Return logits [texts, labels] of a batch."""
        id_BL = batch.long()
        ended_BL1 = (id_BL == 0).unsqueeze(2)
        place_L = torch.arange(id_BL.shape[1], device=id_BL.device)
        length_B1 = (id_BL != 0).sum(1, keepdim=True)
        # Backwards within each text: padding stays at the end, where no word has it before itself.
        back_BL1 = torch.where(place_L < length_B1, length_B1 - 1 - place_L, place_L).unsqueeze(2)
        x_BLX = self.embedding(id_BL)
        for number, (linear, lstm) in enumerate(zip(self.maps, self.lstms, strict=True)):
            x_BLW = linear(x_BLX)
            if number % 2 == 0:
                y_BLH = lstm(x_BLW)[0]
            else:
                turned_BLW = x_BLW.gather(1, back_BL1.expand_as(x_BLW))
                y_BLH = lstm(turned_BLW)[0]
                y_BLH = y_BLH.gather(1, back_BL1.expand_as(y_BLH))
            x_BLX = torch.cat([x_BLW, y_BLH], 2)
        pooled_BX = x_BLX.masked_fill(ended_BL1, -torch.inf).max(1).values
        logits_BC: Tensor = self.linear(self.dropout(pooled_BX))
        return logits_BC

    def onnx_nodes(self) -> tuple[list[onnx.NodeProto], dict[str, NDArray[np.generic]]]:
        """Return the nodes that lead from `ids` [texts, longest] to `logits`, and the constants they use."""
        make = onnx.helper.make_node
        weights = {name: tensor.numpy() for name, tensor in self.weights().items()}
        constants: dict[str, NDArray[np.generic]] = {
            name: weights[name] for name in ("embedding.weight", "linear.weight", "linear.bias")
        }
        constants |= {"zero": np.array(0), "lowest": np.array(-np.inf, np.float32)}
        constants |= {f"axis{axis}": np.array([axis]) for axis in (0, 1, 2)}
        nodes = [  # words first, as ONNX's LSTM wants it: [L, B, …]
            make("Transpose", ["ids"], ["ids_LB"], perm=[1, 0]),
            make("Gather", ["embedding.weight", "ids_LB"], ["x0"]),
            make("Equal", ["ids_LB", "zero"], ["is_padding"]),
            make("Unsqueeze", ["is_padding", "axis2"], ["ended"]),
            make("Not", ["is_padding"], ["is_word"]),
            make("Cast", ["is_word"], ["ones"], to=onnx.TensorProto.INT32),
            make("ReduceSum", ["ones", "axis0"], ["lengths"], keepdims=0),
        ]
        for i in range(len(self.lstms)):
            constants |= {f"map{i}": weights[f"maps.{i}.weight"].T, f"map_bias{i}": weights[f"maps.{i}.bias"]}
            lstm = {
                name: _gates(weights[f"lstms.{i}.{name}_l0"])
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }
            constants |= {f"W{i}": lstm["weight_ih"][None], f"R{i}": lstm["weight_hh"][None]}
            constants[f"B{i}"] = np.concatenate([lstm["bias_ih"], lstm["bias_hh"]])[None]
            direction, hidden = ("reverse" if i % 2 else "forward"), lstm["weight_hh"].shape[1]
            nodes += [
                make("MatMul", [f"x{i}", f"map{i}"], [f"mapped{i}"]),
                make("Add", [f"mapped{i}", f"map_bias{i}"], [f"w{i}"]),
                make(
                    "LSTM",
                    [f"w{i}", f"W{i}", f"R{i}", f"B{i}", "lengths"],
                    [f"Y{i}"],
                    hidden_size=hidden,
                    direction=direction,
                ),
                make("Squeeze", [f"Y{i}", "axis1"], [f"y{i}"]),
                make("Concat", [f"w{i}", f"y{i}"], [f"x{i + 1}"], axis=2),
            ]
        nodes += [
            make("Where", ["ended", "lowest", f"x{len(self.lstms)}"], ["alive"]),
            make("ReduceMax", ["alive", "axis0"], ["features"], keepdims=0),
            make("Gemm", ["features", "linear.weight", "linear.bias"], ["logits"], transB=1),
        ]
        return nodes, constants


def _gates(stacked: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a weight's four gates in ONNX's order (input, output, forget, cell) from PyTorch's (i, f, g, o)."""
    i, f, g, o = np.split(stacked, 4)
    return np.concatenate([i, o, f, g])
