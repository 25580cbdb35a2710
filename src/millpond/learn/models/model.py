"""What training, evaluation and export ask of a model and of its options; each model is one file that keeps this."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Self

import msgspec
import numpy as np
import onnx
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor, nn

from millpond import MillpondError
from millpond.learn.encoded import Encoded
from millpond.text import TextConfig, TextEncoder


class ModelError(MillpondError):
    """A model or its options are not known, or what the model is made of is not on this machine."""


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes and constants of a model: scalars all, so that config.json can carry them."""

    max_words: Annotated[int, Meta(ge=1, le=1_000_000)] = 100_000
    """Words of a text that are read."""

    def text_config(self) -> TextConfig:
        """Return how texts become ids for this model."""
        raise NotImplementedError

    def learn_encoder(self, texts: Sequence[str]) -> TextEncoder:
        """Return what turns texts into ids; `texts` are those to train on."""
        raise NotImplementedError

    def encoding(self) -> dict[str, Any]:
        """Return what `learn_encoder` depends on: options equal in it share their encoded texts in a search."""
        return msgspec.structs.asdict(self)

    def resolved(self) -> Self:
        """Return the options with what they only name looked up, so that config.json holds all of the model.

        Raises:
            ModelError: what they name is not on this machine.
        """
        return self


class VocabularyOptions(ModelOptions, frozen=True, kw_only=True):
    """Options of a model whose words are those of its training texts."""

    min_count: Annotated[int, Meta(ge=1)]
    """Times a word must be seen in training to be known."""
    max_vocabulary: Annotated[int, Meta(ge=2)] = 100_000

    def learn_encoder(self, texts: Sequence[str]) -> TextEncoder:
        """Return an encoder with the vocabulary of `texts`."""
        return TextEncoder.learn(
            texts, self.text_config(), min_count=self.min_count, max_vocabulary=self.max_vocabulary
        )

    def encoding(self) -> dict[str, Any]:
        """Return what `learn_encoder` depends on."""
        counts = {"min_count": self.min_count, "max_vocabulary": self.max_vocabulary}
        return msgspec.structs.asdict(self.text_config()) | counts


ONNX_OPSET = 21
"""Of the nodes that models return; any ONNX Runtime since 1.18 reads it."""
EVALUATION_FLOATS = 2**26
"""Numbers that a batch may take on the device when nothing is learned: 256 MiB."""


class TextModel(nn.Module):
    """A model from ids to logits. A text's logits must not depend on the other texts of its batch."""

    floats_per_id: int
    """Numbers computed for each id of a text, which bounds how many ids an evaluation batch may have."""
    pads_texts: bool = True
    """Whether a batch is as wide as its longest text, the others filled up."""

    @abstractmethod
    def prepare(self, data: Encoded, labels: NDArray[np.int64]) -> None:
        """Set what is known before the first step: counts of the training texts, pretrained weights."""

    @staticmethod
    @abstractmethod
    def batch(data: Encoded) -> NDArray[np.int32]:
        """Return what `forward` takes for these texts, as one array: one upload a step."""

    @abstractmethod
    def forward(self, batch: Tensor, texts: int) -> Tensor:
        """Return logits [texts, labels] of a batch."""

    def weights(self) -> dict[str, Tensor]:
        """Return what answers are computed from, on the CPU."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Take weights that `weights` returned."""
        self.load_state_dict(weights)

    @abstractmethod
    def onnx_nodes(self) -> tuple[list[onnx.NodeProto], dict[str, NDArray[np.generic]]]:
        """Return the nodes that lead from `ids` [texts, longest] to `logits`, and the constants they use."""
