"""A pretrained encoder: found on this machine or said clearly, fine-tuned, exported, served without its library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from millpond.learn.fit import answer
from millpond.learn.models import ModelError, options_of
from millpond.learn.recipes import read_recipe
from millpond.learn.run import run
from millpond.settings import LearnSettings

from .conftest import make_rows, write_jsonl


@pytest.mark.slow
def test_an_encoder_learns_and_is_served_without_torch_and_transformers(pretrained: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(300))
    recipe = read_recipe(
        None,
        {
            "data": {"file": str(rows)},
            "model": {"architecture": "encoder", "options": {"pretrained": str(pretrained), "max_words": 48}},
            "training": {"epochs": 6, "batch_size": 16, "learning_rate": 2e-3},
        },
    )
    settings = LearnSettings(home=tmp_path / "home", threads=1)
    done = run(recipe, settings, device="cpu", name="small", out=tmp_path / "run", report=lambda at: None)
    assert done.evaluation.accuracy > 0.8
    texts = ["great and lovely film", "", "awful " * 500, *done.dataset.test.texts[:20]]
    expected = answer(done.trained.model, done.trained.encoder, texts, torch.device("cpu"))
    code = (
        "import json, sys; from pathlib import Path; from millpond.edge.engine import Engine;"
        "directory = Path(sys.argv[1]); engine = Engine(directory, 'sha256:' + '0' * 64, threads=1);"
        "engine.check_golden(directory); print(json.dumps(engine.scores(json.load(sys.stdin)).tolist()));"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )

    served = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run/model")],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert np.array(json.loads(served.stdout)) == pytest.approx(expected, abs=1e-4)
    # the artifact holds the encoder whole: it loads again when the directory it came from is gone
    from millpond.learn.export import read_model

    pretrained.rename(pretrained.with_name("moved"))
    try:
        loaded, encoder, _ = read_model(tmp_path / "run/model")
        assert answer(loaded, encoder, texts, torch.device("cpu")) == pytest.approx(expected, abs=1e-5)
    finally:
        pretrained.with_name("moved").rename(pretrained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"pretrained": "nobody/has-this"},
            "neither a directory nor in this machine's Hugging Face cache.*hf download",
        ),
        ({"pretrained": "../no name"}, "neither a directory nor"),
    ],
)
def test_an_encoder_that_is_not_here_is_not_fetched(
    options: dict[str, str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=says):
        options_of("encoder", options)


def test_a_directory_that_lacks_a_file_is_no_encoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"lacks tokenizer\.json, model\.safetensors"):
        options_of("encoder", {"pretrained": str(tmp_path)})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("not json", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"max_position_embeddings": 64}', "reads 64 pieces at most"),
        (" " * 200_000, "larger than"),
    ],
)
def test_a_config_that_cannot_be_is_refused(config: str, says: str, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=says):
        options_of("encoder", {"pretrained": str(tmp_path), "max_words": 65})


def test_an_encoder_in_a_recipe_lies_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / "mine" / name).write_text("{}")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[data]\ncorpus = "imdb"\n[model]\narchitecture = "encoder"\noptions = { pretrained = "mine" }\n')
    assert read_recipe(recipe).model.options["pretrained"] == str(tmp_path / "mine")


def test_code_that_a_config_names_is_never_kept(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "auto_map": {"AutoModel": "evil.Model"}}')
    options = options_of("encoder", {"pretrained": str(tmp_path)})
    assert "evil" not in options.config
