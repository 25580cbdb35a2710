"""The models by name."""

from __future__ import annotations

from typing import Any

import msgspec

from millpond.learn.models.encoder import Encoder, EncoderOptions
from millpond.learn.models.lstm import Lstm, LstmOptions
from millpond.learn.models.model import ModelError, ModelOptions, TextModel
from millpond.learn.models.ngram import NGram, NGramOptions
from millpond.learn.models.seqcnn import SeqCnn, SeqCnnOptions

__all__ = ["MODELS", "ModelError", "ModelOptions", "TextModel", "build", "options_of"]

MODELS: dict[str, tuple[type[Any], type[ModelOptions]]] = {
    "ngram": (NGram, NGramOptions),
    "seqcnn": (SeqCnn, SeqCnnOptions),
    "lstm": (Lstm, LstmOptions),
    "encoder": (Encoder, EncoderOptions),
}
"""Name → the model's class, called with (options, rows, labels), and the class of its options."""


def options_of(architecture: str, given: dict[str, Any]) -> ModelOptions:
    """Return a model's options, defaults where nothing is given.

    Raises:
        ModelError: there is no such model or option, a value is of the wrong kind, or what an option names is not here.
    """
    if architecture not in MODELS:
        raise ModelError(f"there is no model {architecture!r}; there are {', '.join(MODELS)}.")
    _, kind = MODELS[architecture]
    try:
        return msgspec.convert(given, kind).resolved()
    except msgspec.ValidationError as error:
        known = ", ".join(field.name for field in msgspec.structs.fields(kind))
        raise ModelError(f"options of {architecture}: {error}. It has: {known}.") from error


def build(architecture: str, options: ModelOptions, rows: int, labels: int) -> TextModel:
    """Make a model with fresh weights, `rows` ids and `labels` outputs, on the CPU."""
    model: TextModel = MODELS[architecture][0](options, rows, labels)
    return model
