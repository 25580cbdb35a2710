"""`millpond demo`: the whole loop on this machine, on real reviews."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from millpond.demo.services import Site
    from millpond.demo.summary import Summary

app = typer.Typer()


@app.callback(invoke_without_command=True)
def demo(
    keep: bool = typer.Option(False, "--keep", help="Leave the services up, and print their pages."),
    json_file: Path | None = typer.Option(None, "--json", metavar="FILE", help="Write the summary here as JSON too."),
    corpus: str = typer.Option("auto", help="imdb, imdb-train, or auto: imdb where it can be had."),
    screenshots: Path | None = typer.Option(None, metavar="DIR", help="Take pictures of the pages (needs playwright)."),
    stop: Path | None = typer.Option(None, metavar="DIR", help="Stop the services that an earlier --keep left in DIR."),
) -> None:
    """Train, serve, correct, review, retrain, promote, serve the better model; then say what was measured."""
    from millpond.demo.services import stop_kept

    console = Console(highlight=False)
    if stop is not None:
        console.print(f"Stopped: {', '.join(stop_kept(stop)) or 'nothing was running'}.")
        return
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no directory {json_file.absolute().parent}", param_hint="--json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that services are stopped on the way out
    home = Path(tempfile.mkdtemp(prefix="millpond-demo-"))
    try:
        summary = _run(home, corpus, keep=keep, screenshots=screenshots, console=console)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or not (home / "logs").exists():
            shutil.rmtree(home, ignore_errors=True)
        else:
            console.print(f"[bold]The demo did not come to its end.[/] Logs and state stay in {home}.", soft_wrap=True)
        raise
    if json_file is not None:
        json_file.write_bytes(summary.as_json() + b"\n")
    if not keep:
        shutil.rmtree(home, ignore_errors=True)


def _run(home: Path, corpus_name: str, *, keep: bool, screenshots: Path | None, console: Console) -> Summary:
    from millpond.demo.corpus import prepare
    from millpond.demo.loop import Loop
    from millpond.demo.services import Site

    began = time.monotonic()
    seconds: dict[str, float] = {}
    corpus = prepare(corpus_name, home, console)
    seconds["data"] = round(time.monotonic() - began, 2)
    console.print("[bold]pool, hub and edge start[/] (own processes, own homes, on loopback)")
    started = time.monotonic()
    with Site(home, recipe=corpus.recipe, retrain_after=1, keep=keep) as site:
        seconds["start"] = round(time.monotonic() - started, 2)
        with Loop(site, corpus, console, seconds) as loop:
            if screenshots is not None:
                from millpond.demo.pictures import Camera

                loop.after_stage = Camera(site, screenshots).take
            summary = loop.run()
        seconds["total"] = round(time.monotonic() - began, 2)
        _print_summary(summary, console)
        if keep:
            _print_pages(site, console)
    return summary


def _print_summary(summary: Summary, console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    for what, figures in summary.lines():
        table.add_row(what, figures)
    console.print()
    console.print(table)


def _print_pages(site: Site, console: Console) -> None:
    console.print(f"\n[bold]The services are up.[/]\n  hub   {site.hub_url}\n  edge  {site.edge_url}")
    console.print(f"  The hub asks for a token; an operator's is in {site.token_file('operator')}", soft_wrap=True)
    stop = shlex.join([str(Path(sys.executable).with_name("millpond")), "demo", "--stop", str(site.home)])
    console.print(f"  Logs: {site.logs}\n  Stop them: {stop}", soft_wrap=True)
