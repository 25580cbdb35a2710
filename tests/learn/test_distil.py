"""A teacher's answers: learned besides labels, computed once, never on texts that measure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from millpond.learn import distil
from millpond.learn.datasets import DataError, Dataset, Split
from millpond.learn.distil import Lesson, distillation, prepare_lesson
from millpond.learn.export import ExportError
from millpond.learn.recipes import DistilTable, read_recipe
from millpond.learn.run import Run, run
from millpond.settings import LearnSettings

from .conftest import make_rows, write_jsonl

CPU = torch.device("cpu")


def train(directory: Path, name: str, rows: Path, model: str, **changes: object) -> Run:
    options = {"ngram": {"buckets": 4096}, "seqcnn": {"embedding": 8, "filters": 8, "min_count": 1}}[model]
    given = {"data": {"file": str(rows)}, "model": {"architecture": model, "options": options}, **changes}
    settings = LearnSettings(home=directory / "home", threads=1)
    out = directory / name
    return run(read_recipe(None, given), settings, device="cpu", name=name, out=out, report=lambda at: None)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """An n-gram model that has seen 600 labelled texts."""
    train(tmp_path, "teacher", write_jsonl(tmp_path / "many.jsonl", make_rows(600)), "ngram")
    return tmp_path / "teacher"


def test_a_student_with_few_labels_learns_from_what_the_teacher_says_of_unlabelled_texts(
    teacher: Path, tmp_path: Path
) -> None:
    rows = write_jsonl(tmp_path / "few.jsonl", make_rows(40, seed=2))
    unlabelled = write_jsonl(tmp_path / "more.jsonl", make_rows(600, seed=3))
    how = {"training": {"epochs": 4, "learning_rate": 0.01}, "validation": 0.0}
    alone = train(tmp_path, "alone", rows, "seqcnn", **how)
    table = {"teacher": str(teacher), "unlabelled": str(unlabelled)}
    taught = train(tmp_path, "taught", rows, "seqcnn", distil=table, **how)
    assert taught.evaluation.log_loss < alone.evaluation.log_loss - 0.1
    assert taught.evaluation.accuracy >= 0.9
    assert taught.trained.train_rows == alone.trained.train_rows
    assert [(source.role, source.rows) for source in taught.trained.sources] == [
        ("teacher", 600 + taught.trained.train_rows),
        ("unlabelled", 600),
    ]


def test_the_loss_is_that_of_the_paper() -> None:
    logits, teachers = torch.tensor([[1.0, -1.0], [0.5, 2.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    weight = np.array([0.25, 1.0], np.float32)
    objective = distillation(np.array([0, 1]), teachers.softmax(1).numpy(), weight, 3.0)
    label = functional.cross_entropy(logits[:1], torch.tensor([0]))
    cross = -((teachers / 3).softmax(1) * (logits / 3).log_softmax(1)).sum(1)
    by_hand = (0.75 * label + 0.25 * 9 * cross[0] + 9 * cross[1]) / 2
    found = objective.loss(logits, torch.from_numpy(objective.targets))
    assert float(found) == pytest.approx(float(by_hand), rel=1e-5)


def test_the_teacher_answers_once_and_again_when_it_or_the_texts_change(
    teacher: Path, small: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    predict = distil.predict
    monkeypatch.setattr(distil, "predict", lambda model, data, device: asked.append(1) or predict(model, data, device))

    def lesson(split: Split) -> Lesson:
        return prepare_lesson(DistilTable(teacher=str(teacher)), small, split, None, CPU, tmp_path / "home")

    first, again = lesson(small.train), lesson(small.train)
    assert len(asked) == 1
    assert (first.objective.targets == again.objective.targets).all()
    lesson(small.train.take(np.arange(10)))
    assert len(asked) == 2
    config = teacher / "model/config.json"
    config.write_text(config.read_text().replace("v1", "v2"))
    lesson(small.train)
    assert len(asked) == 3


def test_texts_that_measure_are_not_taught(teacher: Path, small: Dataset, tmp_path: Path) -> None:
    held = Split(["held back"], np.array([0]))
    texts = [small.test.texts[0], "held back", small.train.texts[0], "new", "new", " "]
    more = write_jsonl(tmp_path / "more.jsonl", [(text, "any") for text in texts])
    table = DistilTable(teacher=str(teacher), unlabelled=str(more))
    lesson = prepare_lesson(table, small, small.train, held, CPU, tmp_path / "home")
    assert lesson.split.texts[len(small.train) :] == ["new"]
    of_label = lesson.objective.targets[:, :2].sum(1)
    assert of_label.tolist() == [0.5] * len(small.train) + [0.0]


def test_a_teacher_of_other_labels_or_none_is_refused(teacher: Path, three_labels: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not know plot"):
        prepare_lesson(DistilTable(teacher=str(teacher)), three_labels, three_labels.train, None, CPU, tmp_path)
    with pytest.raises(DataError, match="no model or run"):
        prepare_lesson(
            DistilTable(teacher=str(tmp_path / "none")), three_labels, three_labels.train, None, CPU, tmp_path
        )
    (teacher / "model/weights.safetensors").write_bytes(b"cut")
    with pytest.raises(ExportError, match="not a model that can be loaded"):
        prepare_lesson(DistilTable(teacher=str(teacher)), three_labels, three_labels.train, None, CPU, tmp_path)


def test_places_in_a_recipe_are_relative_to_it(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[data]\ncorpus = "imdb"\n[distil]\nteacher = "runs/teacher"\nunlabelled = "more.jsonl"\n')
    found = read_recipe(recipe).distil
    assert found is not None
    assert (found.teacher, found.unlabelled) == (str(tmp_path / "runs/teacher"), str(tmp_path / "more.jsonl"))
