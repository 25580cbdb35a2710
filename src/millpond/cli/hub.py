"""`millpond hub`: serve the training site's service, and look at and steer one that runs."""

from __future__ import annotations

import getpass
from typing import Any

import typer

from millpond import MillpondError, settings

app = typer.Typer(no_args_is_help=True)

URL = typer.Option("", "--url", help="Address of the hub; default: the bind address and port of the settings.")
JSON = typer.Option(False, "--json", help="Machine output.")
TIMEOUT_S = 30.0


class HubUnreachable(MillpondError):
    """The hub does not answer, or refused."""


@app.command()
def serve(
    bind: str | None = typer.Option(None, "--bind", help="Address to listen on."),
    port: int | None = typer.Option(None, "--port", help="Port to listen on; 0 picks a free one."),
) -> None:
    """Serve models to edges, take corrections in, train and promote."""
    from millpond.hub import serve as serve_hub

    loaded = settings.load(settings.HubSettings, bind=bind, port=port)
    serve_hub(loaded, settings.load(settings.RegistrySettings))


@app.command()
def status(url: str = URL, as_json: bool = JSON) -> None:
    """Show the loop: champion, corrections, training, edges."""
    state = _call("GET", "/api/v1/state", url)
    if as_json:
        _print_json(state)
        return
    from rich.console import Console
    from rich.table import Table

    facts = Table(show_header=False, box=None)
    champion, counts = state["champion"], state["corrections"]
    facts.add_row("champion", f"{champion['name']} {champion['version']}" if champion else "none yet")
    facts.add_row("corrections", ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    facts.add_row("training", _training(state))
    for record in state["promotions"][:1]:
        verdict = "rolled back" if record["kind"] == "rollback" else "promoted" if record["promoted"] else "refused"
        facts.add_row("last decision", f"{record['version']} {verdict}: {' '.join(record['reasons'])}")
    console = Console(highlight=False)
    console.print(facts)
    edges = Table("edge", "serves", "outbox", "last seen")
    for edge in state["edges"]:
        report = edge["report"]
        serving = (report["serving"] or {}).get("version", "nothing")
        refused = f" (refused {report['refused']['version']})" if report["refused"] else ""
        edges.add_row(edge["name"], serving + refused, f"{report['outbox']:,}", f"{edge['silent_s']:.0f} s ago")
    if state["edges"]:
        console.print(edges)


@app.command()
def retrain(url: str = URL, as_json: bool = JSON) -> None:
    """Start a training now; also makes the first model."""
    started = _call("POST", "/api/v1/jobs", url, {"by": getpass.getuser()})
    if as_json:
        _print_json(started)
    else:
        typer.echo(f"{started['id']} is {started['state']}{', and was already' if started['already'] else ''}.")


@app.command()
def rollback(url: str = URL, as_json: bool = JSON) -> None:
    """Make the champion before the present one the champion again."""
    record = _call("POST", "/api/v1/rollback", url, {"by": getpass.getuser()})
    if as_json:
        _print_json(record)
    else:
        typer.echo(" ".join(record["reasons"]))


def _training(state: dict[str, Any]) -> str:
    if state["why_no_training"]:
        return f"not possible: {state['why_no_training']}"
    since, after = state["accepted_since_training"], state["retrain_after"]
    waiting = f"{since:,} corrections accepted since the last; it starts at {after:,}" if after else "only by hand"
    if not state["jobs"]:
        return waiting
    job = state["jobs"][0]
    progress = job["progress"] or {}
    stage = f", {progress['stage']} {progress['done']:,}/{progress['total']:,}" if progress else ""
    error = f": {job['error']}" if job["error"] else ""
    return f"{job['id']} {job['state']}{stage if job['state'] == 'running' else ''}{error}; {waiting}"


def _call(method: str, path: str, url: str, body: Any = None) -> Any:
    import httpx

    loaded = settings.load(settings.HubSettings)
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(loaded.bind, loaded.bind)  # noqa: S104
    address = url or f"http://{host}:{loaded.port}"
    token = loaded.operator_token
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = httpx.request(method, address.rstrip("/") + path, json=body, headers=headers, timeout=TIMEOUT_S)
        decoded = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise HubUnreachable(
            f"No hub answers at {address}: {error}. Start one with: millpond hub serve; or name it with --url."
        ) from error
    if answer.is_error:
        detail = decoded["error"]
        raise HubUnreachable(f"The hub at {address} refused: {detail['message']} {detail['next']}")
    return decoded


def _print_json(value: Any) -> None:
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(value)).decode())
