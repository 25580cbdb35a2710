"""What the commands that train, measure and look at data show: bars on stderr, tables on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from millpond.settings import LearnSettings, load
from millpond.terminal import plain

if TYPE_CHECKING:
    from millpond.learn.datasets import Dataset
    from millpond.learn.evaluate import Evaluation
    from millpond.learn.inspect import Inspection
    from millpond.learn.run import Run
    from millpond.schema import JobProgress


def console(*, stderr: bool = False) -> Console:
    """Return the console of stdout or stderr."""
    return Console(stderr=stderr, highlight=False)


class Bar:
    """Shows a run on stderr: on a terminal as a bar with stage, loss, accuracy and rate, elsewhere as lines."""

    def __enter__(self) -> Callable[[JobProgress], None]:
        shown = progress.TextColumn("{task.description:<9}"), progress.BarColumn()
        last = progress.TextColumn("{task.fields[shown]}")
        to = console(stderr=True)
        self._bar = progress.Progress(*shown, last, console=to, transient=True, disable=not to.is_terminal)
        self._task = self._bar.add_task("data", total=None, shown="")
        self._last_line = ""
        self._bar.start()
        return self._report

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def hide(self) -> None:
        """Make room on the terminal for something else, until `show`."""
        self._bar.stop()

    def show(self) -> None:
        """Be seen again."""
        self._bar.start()

    def _report(self, at: JobProgress) -> None:
        shown = at.note if at.loss is None else f"loss {at.loss:.4f}  accuracy {at.accuracy or 0:.2%}  {at.note}"
        if not self._bar.disable:
            self._bar.update(self._task, description=at.stage, total=at.total or None, completed=at.done, shown=shown)
        elif (line := at.note.partition(",")[0]) != self._last_line or at.done == at.total:
            # Once at the beginning of each epoch or stage, and at the end of training.
            self._last_line = line
            typer.echo(f"{at.stage:<9} {shown}", err=True)


@contextmanager
def fetching(name: str) -> Iterator[Callable[[int], None]]:
    """Show how much of a corpus is fetched; what it gives is told of each piece."""
    from millpond.learn import corpora

    total = corpora.CORPORA[name].fetched_bytes if name in corpora.CORPORA else None
    shown = progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn()
    rate = progress.TransferSpeedColumn(), progress.TimeRemainingColumn()
    with progress.Progress(*shown, *rate, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"fetching {name}", total=total)
        yield lambda count: bar.update(task, completed=count)


def list_corpora(as_json: bool) -> None:
    """Show the named corpora, and where they lie."""
    from millpond.learn import corpora

    settings = load(LearnSettings)
    places = {name: corpora.place(name, settings) for name in corpora.CORPORA}
    if as_json:
        rows = [
            {
                "name": corpus.name,
                "summary": corpus.summary,
                "licence": corpus.licence,
                "official_test": corpus.official_test,
                "fetched_bytes": corpus.fetched_bytes,
                "place": str(places[corpus.name]) if places[corpus.name] else None,
            }
            for corpus in corpora.CORPORA.values()
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("corpus", "what it is", "on this machine")
    for corpus in corpora.CORPORA.values():
        fetch = f"no; fetch it ({corpus.fetched_bytes / 1e6:.0f} MB):\nmillpond learn data {corpus.name}"
        table.add_row(corpus.name, f"{corpus.summary}\n({corpus.licence})", str(places[corpus.name] or fetch))
    console().print(table)


def show_dataset(dataset: Dataset, as_json: bool) -> None:
    """Show the rows and labels of each split, and what could not be used."""
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    counts = {
        name: {label: int((split.labels == i).sum()) for i, label in enumerate(dataset.labels)}
        for name, split in splits.items()
        if split is not None
    }
    if as_json:
        shown = {"name": dataset.name, "digest": dataset.digest, "source": dataset.source, "rows": counts}
        bad = [{"where": where, "why": why} for where, why in dataset.bad_rows.first]
        official = {"official_test": dataset.official_test}
        typer.echo(json.dumps(shown | official | {"bad_rows": dataset.bad_rows.count, "first_bad_rows": bad}, indent=2))
        return
    table = Table("split", "rows", "labels")
    for name, by_label in counts.items():
        shares = ", ".join(f"{label} {count:,}" for label, count in list(by_label.items())[:10])
        table.add_row(name, f"{sum(by_label.values()):,}", shares + (", …" if len(by_label) > 10 else ""))
    console().print(table, f"{dataset.name} {dataset.digest}\nfrom {dataset.source}", sep="\n")
    show_bad_rows(dataset)


class Counting:
    """Shows on stderr what an inspection looks at, how far it is, and what is left."""

    def __enter__(self) -> Callable[[str, int, int], None]:
        to = console(stderr=True)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description:<16}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            console=to,
            transient=True,
            disable=not to.is_terminal,
        )
        self._task = self._bar.add_task("texts", total=None)
        self._what = ""
        self._bar.start()
        return self._report

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def _report(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._what = what
            self._bar.reset(self._task, description=what, total=total)
            if self._bar.disable:
                typer.echo(f"looking at {what}", err=True)
        self._bar.update(self._task, completed=done)


def show_inspection(it: Inspection) -> None:
    """Show what an inspection found."""
    to = console()
    table = Table("split", "rows", "labels", "words: 5 %, median, 95 %, most", "repeated")
    for name, figures in it.splits.items():
        largest = sorted(figures.labels.items(), key=lambda pair: -pair[1])
        shares = ", ".join(f"{escape(label)} {count / max(1, figures.rows):.1%}" for label, count in largest[:8])
        words = figures.words
        lengths = f"{words.p05:,}  {words.median:,}  {words.p95:,}  {words.most:,}"
        more = f", … {len(largest):,} labels" if len(largest) > 8 else ""
        table.add_row(name, f"{figures.rows:,}", shares + more, lengths, f"{figures.repeated:,}")
    to.print(table, f"{it.name} {it.digest}\nfrom {it.source}", sep="\n", soft_wrap=True)
    found = Table("what", "how many", show_header=False)
    for leak in it.leaks:
        found.add_row(f"texts of {leak.split} that are in {leak.of} too", f"{leak.texts:,} ({leak.rows:,} rows)")
    found.add_row("texts with different labels in different rows", f"{it.conflicting:,}")
    for trait, count in it.traits.items():
        found.add_row(f"texts: {trait}", f"{count:,}")
    if it.languages is not None:
        told = sum(it.languages.values())
        shares = ", ".join(f"{language} {count / told:.1%}" for language, count in list(it.languages.items())[:6])
        found.add_row(f"languages of {told:,} texts", shares)
    if it.near_duplicates is not None:
        near = it.near_duplicates
        groups = f"{near.texts:,} in {near.groups:,} groups; {near.across:,} of test near one of train"
        found.add_row(f"near-duplicates among {near.compared:,} texts", groups)
    if it.label_errors is not None:
        found.add_row(f"labels likely wrong among {it.label_errors.rows:,} rows", f"{it.label_errors.likely:,}")
    to.print(found)
    if it.label_errors is not None and it.label_errors.examples:
        suspects = Table("train row", "label", "likely", "text", title="Labels to look at first", title_justify="left")
        for error in it.label_errors.examples[:5]:
            shown = escape(" ".join(plain(error.example.text).split())[:160])
            row = f"{error.example.row:,}"
            suspects.add_row(
                row, escape(error.example.label), f"{escape(error.suggested)} {error.probability:.1%}", shown
            )
        to.print(suspects)


def show_bad_rows(dataset: Dataset) -> None:
    """Show the first bad rows, if there are any."""
    if dataset.bad_rows.count:
        console().print(f"Bad rows that were not used, {dataset.bad_rows.count:,}:\n{dataset.bad_rows}", markup=False)


def show_run(done: Run) -> None:
    """Show how a run went, and where it lies."""
    training = done.trained.training
    if training.interrupted:
        of = f"epoch {training.best}" if training.best else "the unfinished epoch"
        console().print(f"Interrupted: the model is that of {of}. With --resume it goes on.")
    if training.ended == "early":
        console().print(f"Stopped after epoch {len(training.epochs)}: epoch {training.best} was better, and is kept.")
    if training.resumed:
        console().print(f"Resumed in epoch {training.resumed[0]} after step {training.resumed[1]}.")
    if padding := [epoch.padding for epoch in training.epochs if epoch.padding]:
        share = sum(padding) / len(padding)
        hint = "" if done.trained.how.by_length else "; --by-length makes it less"
        console().print(f"{share:.1%} of what the steps computed on was padding{hint}.")
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in done.watch.seconds.items())
    console().print(f"{stages}\nRun: {done.directory}\nReport: {done.directory / 'report.html'}")


def show_evaluation(evaluation: Evaluation, dataset: Dataset) -> None:
    """Show what a model is right on: by label, by source where there are several, in all."""
    table = Table("label", "rows", "precision", "recall", "F1")
    for score in evaluation.classes[:50]:
        numbers = (f"{value:.4f}" for value in (score.precision, score.recall, score.f1))
        table.add_row(score.label, f"{score.rows:,}", *numbers)
    split = "official test split" if dataset.official_test else "test split"
    console().print(table)
    if len(evaluation.by_source) > 1:
        table = Table("source", "rows", "accuracy")
        for source in evaluation.by_source:
            table.add_row(escape(source.name), f"{source.rows:,}", f"{source.accuracy:.2%}")
        console().print(table)
    console().print(
        f"{dataset.name}, {split}, {evaluation.rows:,} texts: accuracy {evaluation.accuracy:.2%}, "
        f"macro F1 {evaluation.macro_f1:.4f}, log loss {evaluation.log_loss:.4f}, "
        f"calibration error {evaluation.calibration_error:.4f}"
    )
