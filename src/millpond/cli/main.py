"""Load the part that was asked for, run it, turn errors meant for people into messages."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import typer
from rich.console import Console

from millpond import MillpondError, __version__

PARTS = {
    "demo": "Run the whole loop on this machine, on real reviews.",
    "pool": "Offer GPUs over the network, or run a program on one.",
    "learn": "Data, training, evaluation, export.",
    "registry": "Signed, versioned models.",
    "hub": "The training site's service: models out, corrections in.",
    "edge": "The inference site's service.",
    "settings": "Print every setting, its value and where it came from.",
}
"""Each is a module of `millpond.cli` with a Typer application called `app`."""


def build(arguments: Sequence[str], *, whole: bool = False) -> typer.Typer:
    """Return the command with the part that `arguments` name loaded, or with all of them if `whole`."""
    app = typer.Typer(
        help="A shared pool of GPU power, and the text models that it grinds out.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @app.callback(invoke_without_command=True)
    def version(show: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if show:
            typer.echo(f"millpond {__version__}")
            raise typer.Exit

    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    for part, summary in PARTS.items():
        if whole or part == named:
            app.add_typer(importlib.import_module(f"millpond.cli.{part}").app, name=part, help=summary)
        else:
            app.add_typer(typer.Typer(), name=part, help=summary)
    return app


def main() -> None:
    """Run the command line; exits with 0, with 2 for a user's mistake, with 130 after Ctrl-C."""
    try:
        build(sys.argv[1:])(prog_name="millpond")
    except MillpondError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {_escape(str(error))}")
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("millpond"):
            raise
        Console(stderr=True, soft_wrap=True).print(
            f"error: this part needs the package {error.name!r}, which is not installed here. "
            "Install the part's extra, such as pip install 'millpond\\[all]'."
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away (`| head`): not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
