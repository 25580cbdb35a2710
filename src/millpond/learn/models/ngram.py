"""NB-SVM: a linear model over the set of a text's n-grams, each scaled by its naive-Bayes log-count ratio.

Wang and Manning, "Baselines and Bigrams", ACL 2012; here with the logistic loss, as good by
Mesnil et al. 2014.

Shape suffixes: B texts, N ids of all texts of a batch, R rows of the table (one an id), K columns (1 for two labels),
C labels.
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
from millpond.learn.models.ratio import log_count_ratio
from millpond.text import TextConfig


class NGramOptions(VocabularyOptions, frozen=True, kw_only=True):
    """The defaults were chosen on validation splits of IMDB's training split (docs/log.md)."""

    min_count: Annotated[int, Meta(ge=1)] = 2
    max_ngram: Annotated[int, Meta(ge=1, le=5)] = 3
    buckets: Annotated[int, Meta(ge=1, le=2**28)] = 2**21
    """Rows that n-grams of two words and more are hashed into."""
    smoothing: Annotated[float, Meta(gt=0)] = 8.0
    """Added to each count before the ratio is taken (the paper's alpha): more of it trusts rare n-grams less."""
    start: float = 0.01
    """Weight of every scaled n-gram before the first step: a small naive-Bayes classifier."""

    def text_config(self) -> TextConfig:
        """Return how texts become ids for this model."""
        return TextConfig(features="ngrams", max_words=self.max_words, max_ngram=self.max_ngram, buckets=self.buckets)


class NGram(TextModel):
    """Logits = sum over the text's n-grams of ratio x weight, plus a bias.

    A row whose ratio is 0 (padding, and every n-gram that training has not seen) stays 0 whatever its weight.
    """

    pads_texts = False
    ratio_RK: Tensor
    spread_C: Tensor

    def __init__(self, options: NGramOptions, rows: int, labels: int) -> None:
        super().__init__()
        columns = 1 if labels == 2 else labels
        self.smoothing = options.smoothing
        self.floats_per_id = 16 + columns  # indices, widened to int64, and scores
        self.weight_RK = nn.Parameter(torch.full((rows, columns), options.start))
        self.bias_K = nn.Parameter(torch.zeros(columns))
        self.register_buffer("ratio_RK", torch.zeros(rows, columns))
        # Two labels need one column: its score is shared out as -1/2 and +1/2 of it.
        self.register_buffer("spread_C", torch.tensor([-0.5, 0.5]) if columns == 1 else torch.ones(labels))

    def prepare(self, data: Encoded, labels: NDArray[np.int64]) -> None:
        """Set each n-gram's log-count ratio from the training texts."""
        rows, columns = self.ratio_RK.shape
        self.ratio_RK.copy_(torch.from_numpy(log_count_ratio(data, labels, (rows, columns), self.smoothing)))

    @staticmethod
    def batch(data: Encoded) -> NDArray[np.int32]:
        """Return what `forward` takes for these texts, as one array [2, N]: text numbers, ids."""
        return data.with_rows()

    def forward(self, batch: Tensor, texts: int) -> Tensor:
        """Return logits [texts, labels] of a batch."""
        row_N, id_N = batch.long().unbind()
        score_NK = (self.ratio_RK * self.weight_RK).index_select(0, id_N)
        score_BK = score_NK.new_zeros(texts, score_NK.shape[1]).index_add(0, row_N, score_NK)
        logits_BC: Tensor = (score_BK + self.bias_K) * self.spread_C
        return logits_BC

    def weights(self) -> dict[str, Tensor]:
        """Return what answers are computed from, on the CPU: the table (ratio x weight) and the bias."""
        return {"table": (self.ratio_RK * self.weight_RK).detach().cpu(), "bias": self.bias_K.detach().cpu()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take weights that `weights` returned."""
        with torch.no_grad():
            self.ratio_RK.copy_(weights["table"])
            self.weight_RK.fill_(1.0)
            self.bias_K.copy_(weights["bias"])

    def onnx_nodes(self) -> tuple[list[onnx.NodeProto], dict[str, NDArray[np.generic]]]:
        """Return the nodes that lead from `ids` [texts, longest] to `logits`, and the constants they use."""
        weights: dict[str, NDArray[np.generic]] = {name: tensor.numpy() for name, tensor in self.weights().items()}
        nodes = [
            onnx.helper.make_node("Gather", ["table", "ids"], ["scores"]),
            onnx.helper.make_node("ReduceSum", ["scores", "length_axis"], ["sums"], keepdims=0),
            onnx.helper.make_node("Add", ["sums", "bias"], ["score"]),
            onnx.helper.make_node("Mul", ["score", "spread"], ["logits"]),
        ]
        return nodes, weights | {"length_axis": np.array([1]), "spread": self.spread_C.cpu().numpy()}
