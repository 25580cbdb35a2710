"""`millpond settings`: every setting, its value, where it came from."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.table import Table

from millpond import settings

app = typer.Typer()


@app.callback(invoke_without_command=True)
def show(as_json: bool = typer.Option(False, "--json", help="Machine output.")) -> None:
    """Print every setting of every program; secrets are masked."""
    rows = {
        variable: {"value": value, "source": source, "help": help_line}
        for program in settings.PROGRAMS
        for variable, value, source, help_line in settings.describe(program)
    }
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("variable", "value", "from", "what it sets")
    for variable, row in rows.items():
        table.add_row(variable, row["value"], row["source"], row["help"])
    Console().print(table)
