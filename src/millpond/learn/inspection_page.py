"""An inspection as one HTML page that needs nothing else: figures, pictures, and the rows to look at first."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, PercentFormatter, StrMethodFormatter

from millpond.learn.inspect import Inspection, Quantiles
from millpond.learn.page import render
from millpond.learn.pictures import COLOURS, STYLE, draw_matrix, svg, tick

OF_SPLIT = dict(zip(("train", "test", "validation"), COLOURS, strict=False))
NAMED_LABELS = 25


def write_page(inspection: Inspection, to: Path) -> None:
    """Write the page."""
    errors = inspection.label_errors
    rows = sum(split.rows for split in inspection.splits.values())
    render(
        "inspection.html",
        to,
        it=inspection,
        rows=rows,
        labels=len(next(iter(inspection.splits.values())).labels),
        leak=next(leak for leak in inspection.leaks if (leak.split, leak.of) == ("test", "train")),
        figures={
            "labels": svg(labels_figure(inspection)),
            "words": svg(lengths_figure(inspection)),
            "joint": svg(joint_figure(errors.joint, errors.labels)) if errors else "",
        },
    )


@matplotlib.rc_context(STYLE)
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
        axes.barh(at, shares, height * 0.92, color=OF_SPLIT[split], label=split)
    axes.set_yticks(range(len(names)), [tick(name) for name in names])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(loc="outside upper right", ncols=3)
    return figure


@matplotlib.rc_context(STYLE)
def lengths_figure(inspection: Inspection) -> Figure:
    """Draw how many words and bytes the texts have, as shares of each split, on a logarithmic axis."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("words", "bytes"), strict=True):
        for split, figures in inspection.splits.items():
            lengths: Quantiles = getattr(figures, kind)
            shares = [count / max(1, figures.rows) for count in lengths.counts]
            axes.stairs(shares, lengths.edges, color=OF_SPLIT[split], fill=True, alpha=0.18)
            axes.stairs(shares, lengths.edges, color=OF_SPLIT[split], linewidth=1.6, label=split)
            axes.axvline(lengths.median, color=OF_SPLIT[split], linestyle=":", linewidth=1.2)
        axes.set_xscale("log")
        is_wide = lengths.edges[-1] > 1000 * lengths.edges[0]
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if is_wide else (1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(NullLocator())
        axes.set_xlabel(f"{kind} of a text")
        axes.spines["left"].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


@matplotlib.rc_context(STYLE)
def joint_figure(joint: list[list[float]], labels: list[str]) -> Figure:
    """Draw, for the rows with each label, which label they truly have by the estimate."""
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    shares = [[share / max(1e-12, sum(row)) for share in row] for row in joint]
    draw_matrix(axes, shares, labels, [[f"{share:.1%}" for share in row] for row in shares])
    axes.set(xlabel="likely label", ylabel="label in the data")
    return figure
