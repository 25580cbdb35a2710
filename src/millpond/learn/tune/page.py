"""A search as one HTML page that needs nothing else: what was best, what mattered, every trial."""

from __future__ import annotations

from typing import TYPE_CHECKING

from millpond.learn.page import render
from millpond.learn.pictures import svg
from millpond.learn.tune.pictures import figures

if TYPE_CHECKING:
    from pathlib import Path

    from millpond.learn.tune.tuning import Tuning

SHOWN_TRIALS = 200


def shown(value: object) -> str:
    """Return a value of a parameter for people."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_page(tuning: Tuning, to: Path) -> None:
    """Write the page."""
    outcome = tuning.outcome
    ranked = outcome.ranked
    failed = [trial for trial in outcome.trials if trial.state == "failed"]
    render(
        "tuning.html",
        to,
        it=tuning,
        outcome=outcome,
        names=list(outcome.importance) or list(outcome.trials[0].parameters),
        ranked=ranked[:SHOWN_TRIALS],
        left_out=max(0, len(ranked) - SHOWN_TRIALS),
        failed=failed[:SHOWN_TRIALS],
        figures={name: svg(figure) for name, figure in figures(tuning).items()},
        shown=shown,
    )
