"""`millpond edge status|rollback|outbox`: read and change what lies on this edge's disk, running or not."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from millpond import MillpondError
from millpond.edge.models import ModelShelf
from millpond.edge.outbox import Outbox
from millpond.edge.state import EdgeFiles, edge_name, read_state
from millpond.schema import ModelRef, RefusedModel
from millpond.settings import EdgeSettings


class NoEdgeHere(MillpondError):
    """No edge has ever run on this home."""


class Status(msgspec.Struct, kw_only=True):
    """What `millpond edge status --json` prints."""

    edge: str
    home: str
    running: bool
    hub: str | None
    serving: ModelRef | None
    previous: list[ModelRef]
    pinned: str | None
    refused: RefusedModel | None
    last_contact: str | None
    errors: dict[str, str]
    outbox: int
    set_aside: int


def read_status(settings: EdgeSettings) -> Status:
    """Return how this edge is.

    Raises:
        NoEdgeHere: none has run on this home.
    """
    files = _files(settings)
    shelf = ModelShelf(files.models)
    outbox = Outbox(files.outbox, settings.max_outbox)
    try:
        state = read_state(files.sync)
        current = shelf.current()
        refusal = state.refusal(state.champion)
        return Status(
            edge=edge_name(settings),
            home=str(files.root),
            running=files.is_running(),
            hub=settings.hub or None,
            serving=shelf.describe(current.serving) if current else None,
            previous=shelf.previous(),
            pinned=current.pinned if current else None,
            refused=refusal.model if refusal else None,
            last_contact=state.last_contact,
            errors=state.errors,
            outbox=outbox.count("waiting"),
            set_aside=outbox.count("refused"),
        )
    finally:
        outbox.close()


def print_status(settings: EdgeSettings, json: bool) -> None:
    """Print `read_status` as JSON or for people."""
    status = read_status(settings)
    if json:
        print(msgspec.json.encode(status).decode())  # noqa: T201
        return
    table = Table.grid(padding=(0, 2))
    serving = status.serving
    rows = {
        "edge": f"{status.edge}, {'running' if status.running else 'not running'}, in {status.home}",
        "serving": f"{serving.name} {serving.version} ({serving.digest})" if serving else "no model yet",
        "before it": ", ".join(ref.version for ref in status.previous) or "nothing",
        "hub": f"{status.hub or 'none set'}, last contact {status.last_contact or 'never'}",
        "outbox": f"{status.outbox} waiting, {status.set_aside} refused by the hub",
    }
    if status.pinned:
        rows["pinned"] = f"the hub's champion {status.pinned} is held off, until the hub names another"
    if status.refused:
        rows["refused"] = f"{status.refused.version} at {status.refused.at}: {status.refused.reason}"
    rows |= {f"{what} fail": error for what, error in status.errors.items()}
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/]", escape(value))
    Console(highlight=False).print(table)


def roll_back(settings: EdgeSettings) -> None:
    """Go back one version and say so.

    Raises:
        NoEdgeHere, RollbackImpossible: nothing was changed.
    """
    ref = ModelShelf(_files(settings).models).roll_back()
    Console(highlight=False).print(
        f"Serving {ref.name} {ref.version} from now on ({ref.digest}). "
        "The hub's present champion is held off until the hub names another.",
        soft_wrap=True,
    )


def print_outbox(settings: EdgeSettings, json: bool, retry: bool, limit: int) -> None:
    """Print the latest corrections; with `retry` let those that the hub refused wait again."""
    outbox = Outbox(_files(settings).outbox, settings.max_outbox)
    try:
        again = outbox.retry_refused() if retry else 0
        entries = outbox.latest(limit)
        counts = {"waiting": outbox.count("waiting"), "refused": outbox.count("refused")}
    finally:
        outbox.close()
    if json:
        print(msgspec.json.encode({"corrections": entries, **counts, "again": again}).decode())  # noqa: T201
        return
    console = Console(highlight=False)
    table = Table("id", "state", "label", "predicted", "text", box=None, header_style="bold")
    for entry in entries:
        correction = entry.correction
        state = f"{entry.state}: {entry.reason}" if entry.reason else entry.state
        text = " ".join(correction.text[:200].split())[:60]
        table.add_row(
            correction.id, escape(state), escape(correction.label), escape(correction.predicted or ""), escape(text)
        )
    if entries:
        console.print(table)
    if retry:
        console.print(f"{again} corrections that the hub had refused wait again.")
    console.print(f"{counts['waiting']} waiting, {counts['refused']} refused by the hub.")


def _files(settings: EdgeSettings) -> EdgeFiles:
    files = EdgeFiles(settings.home)
    if not Path(files.root).is_dir():
        raise NoEdgeHere(
            f"No edge has run on {files.root}. Start one with `millpond edge serve`, or set MILLPOND_HOME."
        )
    return files
