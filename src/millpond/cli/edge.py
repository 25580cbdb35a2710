"""`millpond edge`: serve, and look into or change what lies on this edge's disk."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help="The inference site's service.")


@app.command()
def serve(
    bind: str | None = typer.Option(None, help="Address to listen on."),
    port: int | None = typer.Option(None, help="Port to listen on; 0 picks a free one."),
    hub: str | None = typer.Option(None, help="URL of the hub."),
) -> None:
    """Serve predictions, take feedback, follow the hub's model."""
    from millpond.edge import serve_edge
    from millpond.settings import EdgeSettings, load

    serve_edge(load(EdgeSettings, bind=bind, port=port, hub=hub))


@app.command()
def status(json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Show the served model, what was refused, and what waits for the hub; works whether the edge runs or not."""
    from millpond.edge.console import print_status
    from millpond.settings import EdgeSettings, load

    print_status(load(EdgeSettings), json)


@app.command()
def rollback() -> None:
    """Serve the version before the present one, until the hub's champion changes."""
    from millpond.edge.console import roll_back
    from millpond.settings import EdgeSettings, load

    roll_back(load(EdgeSettings))


@app.command()
def outbox(
    json: bool = typer.Option(False, "--json", help="Print JSON."),
    retry: bool = typer.Option(False, "--retry", help="Send the corrections that the hub refused once more."),
    limit: int = typer.Option(20, min=1, max=10_000, help="Corrections shown."),
) -> None:
    """List the latest corrections and what became of them."""
    from millpond.edge.console import print_outbox
    from millpond.settings import EdgeSettings, load

    print_outbox(load(EdgeSettings), json, retry, limit)
