"""Encoded texts that the trials of a search share: each way to encode is done once, kept on disk and mapped."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from pathlib import Path

import msgspec
import numpy as np

from millpond.learn.datasets import Split
from millpond.learn.encoded import Encoded
from millpond.learn.fit import encode_splits
from millpond.learn.models import ModelOptions
from millpond.text import TextEncoder


def shared_encodings(
    directory: Path, options: ModelOptions, learned: Split, held: Split | None
) -> tuple[TextEncoder, Encoded, Encoded | None]:
    """Return what `encode_splits` does, from `directory` where another trial has put it there.

    The rows must be the same for all that share a directory. Two trials that begin at once may both encode; what they
    write is equal, and the first to finish is taken.
    """
    assert held is not None
    name = hashlib.sha256(msgspec.json.encode([type(options).__name__, options.encoding()], order="sorted")).hexdigest()
    place = directory / name[:32]
    if not place.is_dir():
        encoder, of_learned, of_held = encode_splits(options, learned, held)
        assert of_held is not None
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".new-") as temporary:
            new = Path(temporary) / "encoding"
            new.mkdir()
            (new / "tokenizer.json").write_text(encoder.tokenizer_json, encoding="utf-8")
            for split, encoded in (("learned", of_learned), ("held", of_held)):
                np.save(new / f"{split}-ids.npy", encoded.ids, allow_pickle=False)
                np.save(new / f"{split}-starts.npy", encoded.starts, allow_pickle=False)
            with contextlib.suppress(OSError):  # another was first
                new.rename(place)
    encoder = TextEncoder((place / "tokenizer.json").read_text(encoding="utf-8"), options.text_config())
    return encoder, _mapped(place, "learned"), _mapped(place, "held")


def _mapped(place: Path, split: str) -> Encoded:
    ids, starts = (
        np.asarray(np.load(place / f"{split}-{what}.npy", mmap_mode="r", allow_pickle=False))
        for what in ("ids", "starts")
    )
    return Encoded(ids, starts)
