"""Small labelled texts with a pattern that every model can learn, and torch kept to one thread."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from millpond.learn.datasets import Dataset, from_rows

WORDS = {
    "negative": ["awful", "boring", "dull", "waste", "worst"],
    "positive": ["great", "lovely", "moving", "superb", "best"],
    "plot": ["city", "murder", "brother", "finds", "travels"],
}
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
FILLER = ["the", "film", "was", "a", "and", "it", "with", "story", "actor", "scene", "of", "to"]


def make_rows(count: int, labels: tuple[str, ...] = ("negative", "positive"), seed: int = 0) -> list[tuple[str, str]]:
    """Return texts of filler with two telling words each; every text is different."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        label = labels[i % len(labels)]
        words = [*rng.choices(FILLER, k=rng.randint(5, 40)), *rng.choices(WORDS[label], k=2), f"number{i}"]
        rng.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


def write_jsonl(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_bytes(msgspec.json.Encoder().encode_lines([{"text": text, "label": label} for text, label in rows]))
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two small layers as Hugging Face's library writes it; nobody has trained it."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("pretrained")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=MARKS, show_progress=False)
    tokenizer.train_from_iterator([" ".join(words) for words in (FILLER, *WORDS.values())], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    transformers.logging.disable_progress_bar()
    transformers.BertModel(config).save_pretrained(directory)
    return directory


@pytest.fixture
def small() -> Dataset:
    """400 texts to train, 100 to test, two labels."""
    return from_rows("small", {"train": make_rows(400), "test": make_rows(100, seed=1)})


@pytest.fixture
def three_labels() -> Dataset:
    labels = ("negative", "plot", "positive")
    return from_rows("three", {"train": make_rows(600, labels), "test": make_rows(99, labels, seed=1)})
