"""Text to ids: the one encoder that training and edge share, so that both see a text alike. Knows no torch.

A `tokenizer.json` (of the `tokenizers` library) splits a text into words; a `TextConfig` says what becomes of
them: the words themselves (for sequence models), the set of their hashed n-grams (for linear models), or the pieces
of words between the marks of a pretrained encoder. Id 0 is padding, always; no text gives an empty row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from millpond import MillpondError

Ids = NDArray[np.int64]

UNKNOWN = "[UNK]"
MAX_TOKENIZER_BYTES = 64 * 1024 * 1024
"""Largest tokenizer.json that is read."""
CHUNK = 512
"""Texts encoded at a time: enough to keep all cores busy, small enough for the n-grams to stay in cache."""


class TextError(MillpondError):
    """A tokenizer or its configuration cannot be used."""


class TextConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of a text's words. It travels in a model's config.json, beside its tokenizer.json."""

    features: Literal["words", "ngrams", "pieces"] = "words"
    max_words: Annotated[int, Meta(ge=1, le=1_000_000)] = 1_000_000
    """Words of a text that are read (for `pieces`: pieces, the marks included); others are not seen by the model."""
    last_words: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    """How many of `max_words` are the text's last words, where it is longer; for `words` and `ngrams`."""
    max_ngram: Annotated[int, Meta(ge=1, le=5)] = 3
    """Longest n-gram, for `ngrams`."""
    buckets: Annotated[int, Meta(ge=1, le=2**28)] = 2**20
    """Rows that n-grams of two words and more are hashed into, for `ngrams`; a single word has its own row."""


class TextEncoder:
    """Turn texts into rows of ids."""

    def __init__(self, tokenizer_json: str, config: TextConfig) -> None:
        """Load a tokenizer.

        Raises:
            TextError: the tokenizer cannot be read.
        """
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises plain Exception
            raise TextError(f"tokenizer.json cannot be read: {error}. The model is damaged; fetch it again.") from error
        self.config = config
        self.vocabulary = self._tokenizer.get_vocab_size()
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._unknown: int = 0
        if config.features == "pieces":
            self._limit_pieces()
            return
        unknown = self._tokenizer.token_to_id(UNKNOWN)
        if unknown is None:
            raise TextError(f"tokenizer.json has no {UNKNOWN} token. The model is damaged; fetch it again.")
        if config.last_words >= config.max_words:
            raise TextError(
                f"last_words ({config.last_words:,}) is a part of max_words ({config.max_words:,}): lower it."
            )
        self._unknown = unknown

    @classmethod
    def from_dir(cls, model_dir: Path) -> TextEncoder:
        """Load the encoder of a model directory (config.json, tokenizer.json).

        Raises:
            TextError: a file is missing, too large or not what it should be.
        """
        try:
            config = msgspec.json.decode((model_dir / "config.json").read_bytes(), type=_HasText).text
            path = model_dir / "tokenizer.json"
            if path.stat().st_size > MAX_TOKENIZER_BYTES:
                raise TextError(f"{path} is larger than {MAX_TOKENIZER_BYTES} bytes; it is no tokenizer of Millpond's.")
            return cls(path.read_text(encoding="utf-8"), config)
        except (OSError, UnicodeDecodeError, msgspec.MsgspecError) as error:
            raise TextError(f"the encoder of {model_dir} cannot be read: {error}. Fetch the model again.") from error

    @classmethod
    def learn(cls, texts: Iterable[str], config: TextConfig, *, min_count: int, max_vocabulary: int) -> TextEncoder:
        """Build the vocabulary of `texts`: words seen at least `min_count` times, the most frequent first."""
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Replace(Regex(r"<br\s*/?>"), " "), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(
            vocab_size=max_vocabulary, min_frequency=min_count, special_tokens=[UNKNOWN], show_progress=False
        )
        tokenizer.train_from_iterator(map(_clean, texts), trainer)
        return cls(tokenizer.to_str(), config)

    @property
    def rows(self) -> int:
        """Return how many ids there are, padding included: the height of a model's table."""
        return 1 + self.vocabulary + (self.config.buckets if self.config.features == "ngrams" else 0)

    @property
    def tokenizer_json(self) -> str:
        """Return what belongs into tokenizer.json."""
        return str(self._tokenizer.to_str())

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return one array of ids ≥ 1 for each text, never an empty one."""
        ids, starts = self.encode_flat(texts)
        return np.split(ids, starts[1:-1]) if len(texts) else []

    def encode_flat(self, texts: Iterable[str]) -> tuple[Ids, Ids]:
        """Return the ids of all texts in one array, and where each text starts (one entry more than texts)."""
        chunks: list[Ids] = []
        lengths: list[Ids] = []
        for tokens, counts in self._words_by_chunk(iter(texts)):
            if self.config.features == "ngrams":
                tokens, counts = self._ngrams(tokens, counts)
            chunks.append(tokens + 1)
            lengths.append(counts)
        starts = np.zeros(sum(map(len, lengths)) + 1, np.int64)
        if lengths:
            np.cumsum(np.concatenate(lengths), out=starts[1:])
        return np.concatenate(chunks) if chunks else np.empty(0, np.int64), starts

    def _words_by_chunk(self, texts: Iterator[str]) -> Iterator[tuple[Ids, Ids]]:
        """Split texts into words, the next chunk in a thread while the caller works on this one."""
        chunk = list(islice(texts, CHUNK))
        if len(chunk) < CHUNK:  # all there is: a thread would only cost
            yield from [self._words(chunk)] if chunk else []
            return
        with ThreadPoolExecutor(1, "words") as ahead:
            coming = ahead.submit(self._words, chunk)
            while chunk := list(islice(texts, CHUNK)):
                words, coming = coming.result(), ahead.submit(self._words, chunk)
                yield words
            yield coming.result()

    def _words(self, texts: list[str]) -> tuple[Ids, Ids]:
        marks = self.config.features == "pieces"
        encoded = self._tokenizer.encode_batch_fast(list(map(_clean, texts)), add_special_tokens=marks)
        rows = [self._read(encoding.ids) or [self._unknown] for encoding in encoded]
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.concatenate([np.asarray(row, np.int64) for row in rows]), counts

    def _read(self, words: list[int]) -> list[int]:
        """Return the words of a text that are read."""
        most, last = self.config.max_words, self.config.last_words
        if len(words) <= most:
            return words
        return words[: most - last] + words[len(words) - last :]

    def _limit_pieces(self) -> None:
        """Have the tokenizer cut texts so that the marks at both ends fit in.

        Raises:
            TextError: it sets no marks, so that an empty text would be an empty row, or they alone are too many.
        """
        try:
            marks = self._tokenizer.num_special_tokens_to_add(is_pair=False)
            if marks == 0 or marks >= self.config.max_words:
                raise TextError(
                    f"tokenizer.json sets {marks} marks around a text of at most {self.config.max_words} pieces; "
                    "an encoder needs one at least, and room beside them. Raise max_words, or take another encoder."
                )
            self._tokenizer.enable_truncation(self.config.max_words)
        except ValueError as error:
            raise TextError(f"tokenizer.json cannot cut texts to {self.config.max_words} pieces: {error}") from error

    def _ngrams(self, words: Ids, counts: Ids) -> tuple[Ids, Ids]:
        """Return the set of n-grams of each text: word ids below `vocabulary`, hashed n-grams above."""
        row = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        keys = [row * self.rows + words]
        hashed = words.astype(np.uint64)
        for n in range(2, self.config.max_ngram + 1):
            hashed = _mix(hashed[:-1], words[n - 1 :])
            within = row[n - 1 :] == row[: len(hashed)]
            bucket = (hashed[within] >> np.uint64(11)) % np.uint64(self.config.buckets)
            keys.append(row[: len(hashed)][within] * self.rows + self.vocabulary + bucket.astype(np.int64))
        key = np.concatenate(keys)
        key.sort()
        key = key[np.concatenate(([True], key[1:] != key[:-1]))]
        row, tokens = np.divmod(key, self.rows)
        return tokens, np.bincount(row, minlength=len(counts)).astype(np.int64)


def pad(rows: Sequence[Ids]) -> Ids:
    """Return `rows` as one matrix [rows, longest], filled up with 0 on the right."""
    matrix = np.zeros((len(rows), max(map(len, rows), default=1)), np.int64)
    for row, ids in zip(matrix, rows, strict=True):
        row[: len(ids)] = ids
    return matrix


def _clean(text: str) -> str:
    """Return `text` with "?" for every lone surrogate: it has no UTF-8 and would stop the tokenizer."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


class _HasText(msgspec.Struct):
    text: TextConfig


def _mix(hashed: NDArray[np.uint64], word: Ids) -> NDArray[np.uint64]:
    """Add a word to a hash: multiply, xor-shift, multiply (the finalizer of SplitMix64, Steele et al. 2014)."""
    mixed = (hashed + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9) + word.astype(np.uint64)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
