"""What a dataset is like before anything is trained on it: sizes, lengths, languages, repeats, leaks, likely errors.

Every figure is of all rows, unless it says of how many: languages are told of a sample, near-duplicates and likely
label errors of so many texts that a core has them in minutes.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from millpond.learn.datasets import Dataset, Split
from millpond.learn.duplicates import MOST_TEXTS, near_duplicates
from millpond.learn.suspects import MOST_ROWS, find_suspects
from millpond.learn.texts import numbered

OnProgress = Callable[[str, int, int], None]
"""Told what is looked at, how much of it is done, and of how much."""

LANGUAGE_TEXTS = 2000
LANGUAGE_CHARACTERS = 500
"""Characters of a text by which its language is told."""
SHOWN = 25
SHOWN_CHARACTERS = 1000
BINS = 40

TRAITS = {
    "beyond ASCII": re.compile(r"[^\x00-\x7f]"),
    "markup": re.compile(r"<[a-zA-Z/][^<>]{0,200}>|&(?:[a-z]{2,8}|#\d{1,6});"),
    "decoded wrongly": re.compile(r"Ã[\x80-\xbf]|Â[\xa0-\xbf]|â€[\x80-\xff™œ˜“”•–—]|ï¿½"),
    "replacement characters": re.compile("\ufffd"),
    "control characters": re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
    "right to left": re.compile("[\u0590-\u08ff\u202b\u202e\ufb1d-\ufdff\ufe70-\ufefc]"),
}
"""What a text may hold that is worth knowing; UTF-8 read as Windows-1252 looks like `Ã©` and `â€™`."""


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """How a length is distributed, and a histogram of its logarithm: edges (one more than counts) and counts."""

    least: int
    p05: int
    p25: int
    median: int
    p75: int
    p95: int
    most: int
    mean: float
    edges: list[float]
    counts: list[int]


class SplitFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One split."""

    rows: int
    labels: dict[str, int]
    words: Quantiles
    bytes: Quantiles
    repeated: int
    """Rows whose text came before in the split."""


class Leak(msgspec.Struct, frozen=True, kw_only=True):
    """Texts of one split that are in another too."""

    split: str
    of: str
    texts: int
    rows: int
    """Rows of `split` that have these texts."""


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """A row that is shown, its text cut."""

    split: str
    row: int
    label: str
    text: str


class NearDuplicate(msgspec.Struct, frozen=True, kw_only=True):
    """Two rows whose texts are nearly the same."""

    one: Example
    two: Example
    similarity: float


class NearDuplicates(msgspec.Struct, frozen=True, kw_only=True):
    """What MinHash found among `compared` different texts."""

    compared: int
    texts: int
    """Texts that are nearly the same as another one."""
    groups: int
    across: int
    """Test texts that are nearly the same as a training text."""
    examples: list[NearDuplicate]


class LabelError(msgspec.Struct, frozen=True, kw_only=True):
    """A training row whose label is likely wrong."""

    example: Example
    suggested: str
    probability: float
    of_label: float


class LabelErrors(msgspec.Struct, frozen=True, kw_only=True):
    """What confident learning found among `rows` training rows."""

    rows: int
    likely: int
    accuracy: float
    """Of the models by which it was found, each on texts that it had not seen."""
    labels: list[str]
    joint: list[list[float]]
    examples: list[LabelError]


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    name: str
    digest: str
    source: str
    official_test: bool
    bad_rows: int
    first_bad_rows: list[tuple[str, str]]
    dropped_leaks: int
    splits: dict[str, SplitFigures]
    conflicting: int
    """Texts that have different labels in different rows."""
    leaks: list[Leak]
    traits: dict[str, int]
    """Texts of all splits that hold what the key says."""
    languages: dict[str, int] | None
    """ISO 639-1 → texts, of a sample; None: the package py3langid is not here."""
    near_duplicates: NearDuplicates | None
    label_errors: LabelErrors | None
    seconds: dict[str, float]


def inspect(
    dataset: Dataset, *, quick: bool = False, on_progress: OnProgress = lambda what, done, total: None
) -> Inspection:
    """Look at a dataset; `quick` leaves out near-duplicates and label errors.

    Raises:
        DataError: a package of the extra `data` is not here.
    """
    seconds: dict[str, float] = {}
    started = time.monotonic()

    def took(stage: str) -> None:
        nonlocal started
        seconds[stage] = round(time.monotonic() - started, 2)
        started = time.monotonic()

    traits: Counter[str] = Counter(dict.fromkeys(TRAITS, 0))
    splits = {name: _figures(dataset, name, traits, on_progress) for name in dataset.splits}
    took("texts")
    languages = _languages(dataset, on_progress)
    took("languages")
    near = errors = None
    if not quick:
        near = _near_duplicates(dataset, on_progress)
        took("near-duplicates")
        errors = _label_errors(dataset, on_progress)
        took("label errors")
    return Inspection(
        name=dataset.name,
        digest=dataset.digest,
        source=dataset.source,
        official_test=dataset.official_test,
        bad_rows=dataset.bad_rows.count,
        first_bad_rows=dataset.bad_rows.first,
        dropped_leaks=dataset.dropped_leaks,
        splits=splits,
        conflicting=_conflicting(dataset),
        leaks=_leaks(dataset),
        traits=dict(traits),
        languages=languages,
        near_duplicates=near,
        label_errors=errors,
        seconds=seconds,
    )


def _figures(dataset: Dataset, name: str, traits: Counter[str], on_progress: OnProgress) -> SplitFigures:
    split = dataset.splits[name]
    words = np.empty(len(split), np.int64)
    for i, text in enumerate(split.texts):
        words[i] = len(text.split())
        for trait, pattern in TRAITS.items():
            if pattern.search(text):
                traits[trait] += 1
        if i % 1000 == 0:
            on_progress(f"{name} texts", i, len(split))
    count = np.bincount(split.labels, minlength=len(dataset.labels)).tolist()
    return SplitFigures(
        rows=len(split),
        labels=dict(zip(dataset.labels, count, strict=True)),
        words=_quantiles(words),
        bytes=_quantiles(split.texts.sizes),
        repeated=len(split) - len(np.unique(split.texts.keys)),
    )


def _quantiles(lengths: NDArray[np.int64]) -> Quantiles:
    least, p05, p25, median, p75, p95, most = (
        round(value) for value in np.quantile(lengths, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]).tolist()
    )
    edges = np.geomspace(max(1, least), max(2, most) + 1, BINS + 1)
    counts, _ = np.histogram(np.maximum(lengths, 1), edges)
    return Quantiles(
        least=least,
        p05=p05,
        p25=p25,
        median=median,
        p75=p75,
        p95=p95,
        most=most,
        mean=round(float(lengths.mean()), 1),
        edges=[round(edge, 3) for edge in edges.tolist()],
        counts=counts.tolist(),
    )


def _whole(dataset: Dataset) -> tuple[Split, NDArray[np.int64]]:
    """Return all splits one after the other, and where each begins (one entry more than splits)."""
    whole = dataset.train
    for name, split in dataset.splits.items():
        whole = whole if name == "train" else whole.with_rows(split)
    return whole, np.cumsum([0, *map(len, dataset.splits.values())])


def _conflicting(dataset: Dataset) -> int:
    whole, _ = _whole(dataset)
    number, first = numbered(whole.texts.keys)
    return len(np.unique(number[whole.labels != whole.labels[first][number]]))


def _leaks(dataset: Dataset) -> list[Leak]:
    names = list(dataset.splits)
    found = []
    for i, of in enumerate(names):
        for name in names[i + 1 :]:
            keys = dataset.splits[name].texts.keys
            leaked = keys[np.isin(keys, dataset.splits[of].texts.keys)]
            found.append(Leak(split=name, of=of, texts=len(np.unique(leaked)), rows=len(leaked)))
    return found


def _languages(dataset: Dataset, on_progress: OnProgress) -> dict[str, int] | None:
    try:
        import py3langid
    except ImportError:
        return None
    whole, _ = _whole(dataset)
    found: Counter[str] = Counter()
    chosen = _sample(len(whole), LANGUAGE_TEXTS)
    for i, text in enumerate(whole.texts.take(chosen)):
        found[py3langid.classify(text[:LANGUAGE_CHARACTERS])[0]] += 1
        if i % 100 == 0:
            on_progress("languages", i, len(chosen))
    return dict(found.most_common())


def _near_duplicates(dataset: Dataset, on_progress: OnProgress) -> NearDuplicates:
    whole, starts = _whole(dataset)
    _, rows = numbered(whole.texts.keys)  # the first row of each text: others are repeats, not near
    rows = rows[_sample(len(rows), MOST_TEXTS)]
    pairs = near_duplicates(whole.texts, rows, lambda done, total: on_progress("near-duplicates", done, total))
    group: dict[int, int] = {}

    def root(row: int) -> int:
        while group.setdefault(row, row) != row:
            group[row] = group[group[row]]
            row = group[row]
        return row

    names = list(dataset.splits)
    across = set()
    for pair in pairs:
        group[root(pair.two)] = root(pair.one)
        one, two = (names[np.searchsorted(starts, row, "right") - 1] for row in (pair.one, pair.two))
        if one == "train" and two == "test":
            across.add(pair.two)

    def example(row: int) -> Example:
        part = int(np.searchsorted(starts, row, "right")) - 1
        return _example(dataset, names[part], row - int(starts[part]))

    shown = sorted(pairs, key=lambda pair: pair.two not in across)[:SHOWN]
    return NearDuplicates(
        compared=len(rows),
        texts=len(group),
        groups=len({root(row) for row in group}),
        across=len(across),
        examples=[
            NearDuplicate(one=example(pair.one), two=example(pair.two), similarity=pair.similarity) for pair in shown
        ],
    )


def _label_errors(dataset: Dataset, on_progress: OnProgress) -> LabelErrors:
    rows = _sample(len(dataset.train), MOST_ROWS)
    found = find_suspects(dataset, rows, lambda done, total: on_progress("label errors", done, total))
    return LabelErrors(
        rows=found.rows,
        likely=len(found.suspects),
        accuracy=round(found.accuracy, 4),
        labels=dataset.labels,
        joint=[[round(share, 5) for share in row] for row in found.joint.tolist()],
        examples=[
            LabelError(
                example=_example(dataset, "train", suspect.row),
                suggested=dataset.labels[suspect.suggested],
                probability=suspect.probability,
                of_label=suspect.of_label,
            )
            for suspect in found.suspects[:SHOWN]
        ],
    )


def _example(dataset: Dataset, split: str, row: int) -> Example:
    rows = dataset.splits[split]
    label = dataset.labels[rows.labels[row]]
    return Example(split=split, row=row, label=label, text=rows.texts[row][:SHOWN_CHARACTERS])


def _sample(count: int, most: int) -> NDArray[np.int64]:
    """Return all of so many rows, or a seeded sample of them in their order."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))
