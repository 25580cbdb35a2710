"""A page is one file, whole or not there, whatever is in the facts."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest

from millpond.learn import page
from millpond.learn.page import render


@pytest.fixture
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A page of its own beside the shared one."""
    for name in ("page.html", "text.html"):
        (tmp_path / name).write_bytes((page.TEMPLATES / name).read_bytes())
    (tmp_path / "own.html").write_text(
        """
{% extends "page.html" %}
{% from "text.html" import cut %}
{% block name %}{{ it }}{% endblock %}
{% block part %}part{% endblock %}
{% block content %}
{{ cut(it * 50) }}
{{ 0.5 | percent }} {{ 0.5 | percent(0) }} {{ 1234 | thousands }} {{ "row" | of(1) }} {{ "row" | of(2) }}
{% endblock %}
"""
    )
    monkeypatch.setattr(page, "TEMPLATES", tmp_path)
    return "own.html"


def test_facts_are_text_and_the_directory_is_made(template: str, tmp_path: Path) -> None:
    render(template, tmp_path / "a/b/page.html", it="<b>\ud800 é")
    html = (tmp_path / "a/b/page.html").read_text(encoding="utf-8")
    assert "<title>&lt;b&gt;? é · part</title>" in html
    assert "<b>" not in html
    assert "<details><summary>&lt;b&gt;? é" in html
    assert "50.00% 50% 1,234 row rows" in html
    assert "Content-Security-Policy" in html
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_made_leaves_the_old_one(template: str, tmp_path: Path) -> None:
    (tmp_path / "page-old.html").write_text("old")
    with pytest.raises(jinja2.UndefinedError):
        render(template, tmp_path / "page-old.html")
    assert (tmp_path / "page-old.html").read_text() == "old"
