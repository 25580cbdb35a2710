"""The encoder: the same text gives the same ids everywhere, and no text breaks it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from millpond.text import CHUNK, TextConfig, TextEncoder, TextError, pad

TEXTS = ["A good film.<br /><br />Good!", "a bad film", "not good, not bad"] * 2


def encoder(**config: object) -> TextEncoder:
    return TextEncoder.learn(TEXTS, msgspec.convert(config, TextConfig), min_count=1, max_vocabulary=1000)


NGRAMS = encoder(features="ngrams", buckets=512)
WORDS = encoder(features="words")


def test_case_and_line_breaks_do_not_matter() -> None:
    one, other = WORDS.encode(["Good<br />FILM", "good film"])
    assert one.tolist() == other.tolist()


def test_ngrams_are_a_set_and_single_words_have_rows_of_their_own() -> None:
    (ids,) = NGRAMS.encode(["good good good"])
    assert len(ids) == 3  # good, good good, good good good
    assert (ids <= NGRAMS.vocabulary).sum() == 1
    assert ids.max() < NGRAMS.rows


def test_ngrams_do_not_cross_from_one_text_to_the_next() -> None:
    alone = [NGRAMS.encode([text])[0].tolist() for text in TEXTS]
    together = [ids.tolist() for ids in NGRAMS.encode(TEXTS)]
    assert together == alone


def test_an_empty_text_and_one_of_unknown_words_have_an_id() -> None:
    for kind in (NGRAMS, WORDS):
        empty, unknown = kind.encode(["", "xyzzy"])
        assert empty.tolist() == unknown.tolist()
        assert len(empty) == 1
        assert empty[0] >= 1


def test_words_after_the_limit_are_not_read() -> None:
    short = encoder(features="words", max_words=3)
    assert [len(ids) for ids in short.encode(["good film " * 50, "good"])] == [3, 1]


def test_the_last_words_of_a_long_text_are_read_where_asked_for() -> None:
    both_ends = encoder(features="words", max_words=3, last_words=2)
    good, a, bad = (WORDS.encode([word])[0][0] for word in ("good", "a", "bad"))
    assert [ids.tolist() for ids in both_ends.encode(["good film film a bad", "a bad"])] == [[good, a, bad], [a, bad]]
    with pytest.raises(TextError, match="last_words"):
        encoder(features="words", max_words=3, last_words=3)


def pieces(max_words: int) -> TextEncoder:
    """An encoder as pretrained models have it: pieces of words between marks."""
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "good": 4, "film": 5, "##s": 6}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    tokenizer.enable_padding(length=128)  # as it comes with sentence encoders
    return TextEncoder(tokenizer.to_str(), TextConfig(features="pieces", max_words=max_words))


def test_pieces_stand_between_marks_and_long_texts_keep_both() -> None:
    long, empty = pieces(5).encode(["good films good films", ""])
    assert (long - 1).tolist() == [2, 4, 5, 6, 3]  # padding takes the place of 0
    assert (empty - 1).tolist() == [2, 3]


def test_pieces_need_room_beside_their_marks() -> None:
    with pytest.raises(TextError, match="2 marks around a text of at most 2 pieces"):
        pieces(2)
    with pytest.raises(TextError, match="0 marks"):
        TextEncoder(WORDS.tokenizer_json, TextConfig(features="pieces"))


def test_more_texts_than_a_chunk_keep_their_order() -> None:
    texts = ["good film" if i % 3 else "bad" for i in range(2 * CHUNK + 7)]
    lengths = [len(ids) for ids in WORDS.encode(texts)]
    assert lengths == [2 if i % 3 else 1 for i in range(2 * CHUNK + 7)]


def test_no_texts_give_no_rows() -> None:
    assert NGRAMS.encode([]) == []


@given(st.lists(st.text(max_size=50), min_size=1, max_size=5))
def test_any_text_has_ids_within_the_table(texts: list[str]) -> None:
    for kind in (NGRAMS, WORDS):
        for ids in kind.encode(texts):
            assert len(ids) >= 1
            assert ids.min() >= 1
            assert ids.max() < kind.rows


@pytest.mark.parametrize(
    "text",
    ["\ud800 lone surrogate", "\x00\x01\x07", "🙂" * 300, "\u202eright to left", "a" * 1_000_000, "word " * 200_000],
    ids=["surrogate", "control", "emoji", "rtl", "one long word", "1 MB of words"],
)
def test_odd_texts_are_encoded(text: str) -> None:
    for kind in (NGRAMS, WORDS):
        (ids,) = kind.encode([text])
        assert len(ids) >= 1


def test_the_tokenizer_file_gives_the_same_ids_in_another_process(tmp_path: Path) -> None:
    """Hashes must not depend on the process, as Python's own do."""
    (tmp_path / "tokenizer.json").write_text(NGRAMS.tokenizer_json)
    (tmp_path / "config.json").write_bytes(msgspec.json.encode({"text": msgspec.to_builtins(NGRAMS.config)}))
    code = (
        "import sys; from pathlib import Path; from millpond.text import TextEncoder;"
        "print(TextEncoder.from_dir(Path(sys.argv[1])).encode([sys.argv[2]])[0].tolist());"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), TEXTS[0]], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(NGRAMS.encode([TEXTS[0]])[0].tolist())


def test_ids_of_known_texts_never_change() -> None:
    """A model in the field depends on them: a change here needs a new kind of features."""
    assert NGRAMS.encode(["a good film"])[0].tolist() == PINNED


PINNED = [2, 3, 5, 178, 215, 384]


def test_a_vocabulary_is_the_same_however_often_it_is_learned() -> None:
    assert encoder().tokenizer_json == encoder().tokenizer_json


def test_pad_fills_with_zeros() -> None:
    matrix = pad([np.array([1, 2, 3]), np.array([4])])
    assert matrix.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert matrix.dtype == np.int64


@pytest.mark.parametrize(
    ("config", "tokenizer", "says"),
    [
        ('{"text": {}}', "{}", "tokenizer.json cannot be read"),
        ('{"text": {"features": "bytes"}}', NGRAMS.tokenizer_json, "cannot be read"),
        ('{"text": {"buckets": -1}}', NGRAMS.tokenizer_json, "cannot be read"),
        ("not json", NGRAMS.tokenizer_json, "cannot be read"),
    ],
)
def test_a_damaged_model_directory_is_refused(tmp_path: Path, config: str, tokenizer: str, says: str) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    with pytest.raises(TextError, match=says):
        TextEncoder.from_dir(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"config\.json"):
        TextEncoder.from_dir(tmp_path)
