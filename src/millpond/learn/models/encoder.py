"""A pretrained encoder of Hugging Face's, fine-tuned: the mean of its last layer over a text's pieces, linear.

Offline: weights and tokenizer come from a directory, or from what the Hugging Face cache of this machine has, as
safetensors only and without any code of theirs. An edge runs the exported graph and needs no transformers.

Shape suffixes: B texts, L pieces of the longest, E width of the encoder, C labels.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
import numpy as np
import onnx
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor, nn

from millpond.learn.encoded import Encoded
from millpond.learn.models.model import ONNX_OPSET, ModelError, ModelOptions, TextModel
from millpond.text import TextConfig, TextEncoder, TextError

FILES = ("config.json", "tokenizer.json", "model.safetensors")
MAX_CONFIG_BYTES = 128 * 1024
EXAMPLE = (2, 8)
"""Texts and pieces of the batch that the graph is traced with; both are free afterwards."""


class EncoderOptions(ModelOptions, frozen=True, kw_only=True):
    """`pretrained` must be given; `config` is filled in from it."""

    pretrained: Annotated[str, Meta(min_length=1, max_length=4096)]
    """A directory with config.json, tokenizer.json and model.safetensors, or a name that is in the local cache."""
    config: str = ""
    """The encoder's own config.json."""
    max_words: Annotated[int, Meta(ge=3, le=100_000)] = 256
    """Pieces of a text that are read, the marks at both ends included."""
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    """Before the last layer; inside, the encoder has its own."""

    def text_config(self) -> TextConfig:
        """Return how texts become ids for this model."""
        return TextConfig(features="pieces", max_words=self.max_words)

    def learn_encoder(self, texts: Sequence[str]) -> TextEncoder:
        """Return an encoder with the tokenizer that belongs to the weights.

        Raises:
            ModelError: it cannot be read.
        """
        path = find(self.pretrained) / "tokenizer.json"
        try:
            return TextEncoder(path.read_text(encoding="utf-8"), self.text_config())
        except (OSError, UnicodeDecodeError, TextError) as error:
            raise ModelError(f"{path} cannot be used: {error}") from error

    def encoding(self) -> dict[str, Any]:
        """Return what `learn_encoder` depends on."""
        return {"pretrained": self.pretrained, "max_words": self.max_words}

    def resolved(self) -> Self:
        """Return the options with the encoder's config.json in them.

        Raises:
            ModelError: the encoder is not on this machine, or reads fewer pieces than `max_words`.
        """
        if self.config:
            return self
        path = find(self.pretrained) / "config.json"
        try:
            raw = path.read_bytes()
            if len(raw) > MAX_CONFIG_BYTES:
                raise ModelError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes: it is no encoder's config.")
            known = msgspec.json.decode(raw, type=dict[str, Any])
        except (OSError, msgspec.MsgspecError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        longest = known.get("max_position_embeddings")
        if isinstance(longest, int) and longest < self.max_words:
            raise ModelError(
                f"max_words is {self.max_words:,}, but {self.pretrained} reads {longest:,} pieces at most. "
                f"Set max_words to {longest:,} or less."
            )
        known.pop("auto_map", None)  # names of code to import: never
        return msgspec.structs.replace(self, config=json.dumps(known, sort_keys=True))


class Encoder(TextModel):
    """Logits of the mean over a text's pieces; padding is masked out everywhere."""

    def __init__(self, options: EncoderOptions, rows: int, labels: int) -> None:
        super().__init__()
        kinds = _transformers()
        try:
            config = kinds.AutoConfig.for_model(**json.loads(options.config))
            self.network: nn.Module = kinds.AutoModel.from_config(config, dtype=torch.float32)
            width, heads = int(config.hidden_size), int(config.num_attention_heads)
            vocabulary = int(config.vocab_size)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{options.pretrained} is no encoder that can be trained here: {error}") from error
        if rows - 1 > vocabulary:
            raise ModelError(
                f"the tokenizer of {options.pretrained} knows {rows - 1:,} pieces, its weights only {vocabulary:,}: "
                "they do not belong together."
            )
        self.pretrained = options.pretrained
        self.floats_per_id = 12 * width + heads * options.max_words
        self.dropout = nn.Dropout(options.dropout)
        self.linear = nn.Linear(width, labels)

    def prepare(self, data: Encoded, labels: NDArray[np.int64]) -> None:
        """Take the pretrained weights.

        Raises:
            ModelError: they cannot be read.
        """
        directory = find(self.pretrained)
        try:
            found = _transformers().AutoModel.from_pretrained(
                directory, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
            )
            self.network.load_state_dict(found.state_dict())
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"the weights in {directory} cannot be used: {str(error)[:500]}") from error

    @staticmethod
    def batch(data: Encoded) -> NDArray[np.int32]:
        """Return what `forward` takes for these texts, as one array [B, L]: ids, 0 where a text has ended."""
        return data.padded()

    def forward(self, batch: Tensor, texts: int) -> Tensor:
        """Return logits [texts, labels] of a batch."""
        id_BL = batch.long()
        is_piece_BL = (id_BL != 0).long()
        piece_BL = (id_BL - 1).clamp(min=0)  # the encoder's own numbers, which begin at 0
        x_BLE = self.network(input_ids=piece_BL, attention_mask=is_piece_BL).last_hidden_state
        weight_BL1 = is_piece_BL.unsqueeze(2).to(x_BLE.dtype)
        mean_BE = (x_BLE * weight_BL1).sum(1) / weight_BL1.sum(1)
        logits_BC: Tensor = self.linear(self.dropout(mean_BE))
        return logits_BC

    def onnx_nodes(self) -> tuple[list[onnx.NodeProto], dict[str, NDArray[np.generic]]]:
        """Return the nodes that lead from `ids` [texts, longest] to `logits`, and the constants they use."""
        traced = _OnlyIds(copy.deepcopy(self).cpu().eval())
        free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2)}
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells what it does not find and nobody asked for
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            program = torch.onnx.export(
                traced,
                (torch.ones(EXAMPLE, dtype=torch.int64),),
                input_names=["ids"],
                output_names=["logits"],
                dynamic_shapes=(free,),
                opset_version=ONNX_OPSET,
                dynamo=True,
                verbose=False,
            )
        assert program is not None  # it is, where it does not write a file
        graph = program.model_proto.graph
        constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        return list(graph.node), constants


class _OnlyIds(nn.Module):
    """The model with the graph's one input."""

    def __init__(self, model: Encoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits_BC: Tensor = self.model(ids, ids.shape[0])
        return logits_BC


def find(pretrained: str) -> Path:
    """Return the directory of an encoder: the one that is named, or the one in the local Hugging Face cache.

    Raises:
        ModelError: it is not on this machine, or not whole.
    """
    directory = Path(pretrained).expanduser()
    if not directory.is_dir():
        directory = _cached(pretrained)
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise ModelError(
            f"{directory} lacks {', '.join(missing)}: an encoder here is a directory with {', '.join(FILES)}."
        )
    return directory


def _cached(name: str) -> Path:
    _transformers()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"the encoder {name!r} is neither a directory nor in this machine's Hugging Face cache, and nothing is "
            f"fetched while training. Fetch it first, where there is a network: hf download {name} — or give a "
            f"directory with {', '.join(FILES)}: --option pretrained=DIRECTORY."
        ) from error


def _transformers() -> Any:
    """Return the transformers library, told to be quiet.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "the model `encoder` needs transformers, which is not installed: pip install 'millpond[encoder]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
