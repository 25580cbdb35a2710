"""Pages for people: each one HTML file that needs nothing else, and that a reader finds whole or not at all."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import jinja2

import millpond
from millpond.files import replace

TEMPLATES = Path(__file__).parent / "templates"
LOOK = Path(millpond.__file__).parent / "web/static/millpond.css"


def render(template: str, to: Path, **facts: Any) -> None:
    """Write the page of a template that extends `page.html`; whatever the facts hold is shown as text.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "thousands": lambda count: f"{count:,}",
        "percent": lambda share, digits=2: f"{share:.{digits}%}",
        "of": lambda noun, count: noun if count == 1 else f"{noun}s",
    }
    page = environment.get_template(template).render(
        facts,
        look=LOOK.read_text(encoding="utf-8"),
        written=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    )
    replace(to, page.encode("utf-8", "replace"), durable=False)  # a text may hold a lone surrogate
