"""A search as one HTML page that needs nothing else: what was best, what mattered, every trial."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from millpond.learn.pictures import svg
from millpond.learn.report import LOOK, TEMPLATES
from millpond.learn.tune.pictures import figures

if TYPE_CHECKING:
    from millpond.learn.tune.tuning import Tuning

SHOWN_TRIALS = 200


def shown(value: object) -> str:
    """Return a value of a parameter for people."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_page(tuning: Tuning, to: Path) -> None:
    """Write the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": lambda share: f"{share:.2%}", "thousands": lambda n: f"{n:,}", "shown": shown}
    outcome = tuning.outcome
    ranked = outcome.ranked
    failed = [trial for trial in outcome.trials if trial.state == "failed"]
    page = environment.get_template("tuning.html").render(
        look=LOOK.read_text(encoding="utf-8"),
        it=tuning,
        outcome=outcome,
        names=list(outcome.importance) or list(outcome.trials[0].parameters),
        ranked=ranked[:SHOWN_TRIALS],
        left_out=max(0, len(ranked) - SHOWN_TRIALS),
        failed=failed[:SHOWN_TRIALS],
        figures={name: svg(figure) for name, figure in figures(tuning).items()},
        written=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    )
    to.write_text(page, encoding="utf-8", errors="replace")
