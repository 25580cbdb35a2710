"""The page on adding a model, followed in a copy of the source as a reader follows it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from learn.conftest import make_rows, write_jsonl

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/how-to/add-a-model.md"


def _add_row(path: Path, table: str, row: str) -> None:
    """Put a row at the end of a table of the source."""
    before, found, after = re.split(rf"(^{table}\b.*?= {{.*?)(?=^}})", path.read_text(), maxsplit=1, flags=re.M | re.S)
    path.write_text(before + found + row + after)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_made_by_the_page_trains_and_keeps_what_models_keep(tmp_path: Path) -> None:
    page = PAGE.read_text()
    file, imports_and_row, default, small = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    commands = [line for block in re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S) for line in block.splitlines()]
    (file_name,) = re.findall(r"^`(src/\S+\.py)`:$", page, re.M)
    shutil.copytree(ROOT / "src/millpond", tmp_path / "src/millpond", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests/learn", tmp_path / "tests/learn", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    models = tmp_path / "src/millpond/learn/models/__init__.py"
    imported, row = imports_and_row.splitlines(keepends=True)
    (tmp_path / file_name).write_text(file)
    _add_row(models, "MODELS", row)
    models.write_text(models.read_text().replace("import msgspec\n", f"import msgspec\n{imported}", 1))
    _add_row(tmp_path / "src/millpond/learn/train.py", "DEFAULTS", default)
    _add_row(tmp_path / "tests/learn/test_models.py", "SMALL", small)
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(400))
    environ = os.environ | {"PYTHONPATH": str(tmp_path / "src"), "MILLPOND_HOME": str(tmp_path / "home")}
    for command in commands:
        command = command.replace("--corpus imdb", f"--file {rows}").replace("millpond ", "-m millpond ", 1)
        test = re.fullmatch(r'make test T="(.*)"', command)
        words = f"-m pytest -q -p no:cacheprovider {test[1]}".split() if test else command.split()
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        if test:
            assert re.search(r"^[3-9] passed", done.stdout, re.M), done.stdout
    accuracy = re.search(r"accuracy (\d+\.\d+)%", done.stdout)
    assert accuracy, done.stdout
    assert float(accuracy[1]) > 75
