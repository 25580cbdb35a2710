"""An inspection as one HTML page that needs nothing else: figures, pictures, and the rows to look at first."""

from __future__ import annotations

import datetime
import io
import re
from pathlib import Path

import jinja2
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

import millpond
from millpond.learn.inspect import Inspection, Quantiles

TEMPLATES = Path(__file__).parent / "templates"
LOOK = Path(millpond.__file__).parent / "web/static/millpond.css"
COLOURS = {"train": "#3b6ea8", "validation": "#7a8b2f", "test": "#c8553d"}
NAMED_LABELS = 25
LABEL_CHARACTERS = 24


def write_page(inspection: Inspection, to: Path) -> None:
    """Write the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"thousands": lambda count: f"{count:,}", "percent": lambda share: f"{share:.1%}"}
    errors = inspection.label_errors
    rows = sum(split.rows for split in inspection.splits.values())
    page = environment.get_template("inspection.html").render(
        look=LOOK.read_text(encoding="utf-8"),
        it=inspection,
        rows=rows,
        labels=len(next(iter(inspection.splits.values())).labels),
        leak=next(leak for leak in inspection.leaks if (leak.split, leak.of) == ("test", "train")),
        figures={
            "labels": _svg(labels_figure(inspection)),
            "words": _svg(lengths_figure(inspection)),
            "joint": _svg(joint_figure(errors.joint, errors.labels)) if errors else "",
        },
        written=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    )
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(page, encoding="utf-8", errors="replace")


def labels_figure(inspection: Inspection) -> Figure:
    """Draw the share of each label in each split; of many labels, the largest."""
    largest = sorted(inspection.splits["train"].labels.items(), key=lambda pair: -pair[1])
    names = [name for name, _ in largest[:NAMED_LABELS]]
    figure = Figure(figsize=(9, 1 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(inspection.splits)
    for i, (split, figures) in enumerate(inspection.splits.items()):
        shares = [figures.labels[name] / max(1, figures.rows) for name in names]
        at = [place + height * (i - (len(inspection.splits) - 1) / 2) for place in range(len(names))]
        axes.barh(at, shares, height * 0.92, color=COLOURS[split], label=split)
    axes.set_yticks(range(len(names)), [_name(name) for name in names])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    return figure


def lengths_figure(inspection: Inspection) -> Figure:
    """Draw how many words and bytes the texts have, as shares of each split, on a logarithmic axis."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("words", "bytes"), strict=True):
        for split, figures in inspection.splits.items():
            lengths: Quantiles = getattr(figures, kind)
            shares = [count / max(1, figures.rows) for count in lengths.counts]
            axes.stairs(shares, lengths.edges, color=COLOURS[split], fill=True, alpha=0.18)
            axes.stairs(shares, lengths.edges, color=COLOURS[split], linewidth=1.6, label=split)
            axes.axvline(lengths.median, color=COLOURS[split], linestyle=":", linewidth=1.2)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(NullLocator())
        axes.set_xlabel(f"{kind} of a text")
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    return figure


def joint_figure(joint: list[list[float]], labels: list[str]) -> Figure:
    """Draw, for the rows with each label, which label they truly have by the estimate."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    shares = [[share / max(1e-12, sum(row)) for share in row] for row in joint]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="likely label", ylabel="label in the data")
    if len(labels) <= NAMED_LABELS:
        places = range(len(labels))
        axes.set_xticks(places, [_name(label) for label in labels], rotation=45 if len(labels) > 3 else 0)
        axes.set_yticks(places, [_name(label) for label in labels])
    if len(labels) <= 10:
        for i, row in enumerate(shares):
            for j, share in enumerate(row):
                colour = "white" if share > 0.5 else "black"
                axes.text(j, i, f"{share:.1%}", ha="center", va="center", color=colour, fontsize=9)
    return figure


def _name(label: str) -> str:
    """Return a label that fits beside a picture; a dollar sign would begin a formula."""
    cut = label if len(label) <= LABEL_CHARACTERS else f"{label[: LABEL_CHARACTERS - 1]}…"
    return re.sub(r"[^\w\s.,:;!?'\"()&/+*#@%-]", "·", cut).replace("$", r"\$")


def _svg(figure: Figure) -> str:
    """Return a figure as an SVG element; its letters are outlines, so that it looks the same everywhere."""
    FigureCanvasSVG(figure)
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return re.sub(r"^.*?(?=<svg )", "", written.getvalue(), count=1, flags=re.DOTALL)
