"""Write docs/reference/settings.md and cli.md from the code; a test fails when they are not up to date."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from millpond import settings
from millpond.cli.main import build

REFERENCE = Path(__file__).parents[1] / "docs/reference"

SETTINGS_HEAD = """# Settings

Every program reads its settings from the environment; an option on the command line wins over them.
A secret `X` may also come from a file: set `X_FILE` to its path. Secrets are never printed.
`millpond settings` shows every value and where it came from; `millpond settings --json` the same for machines.

*This page is written by `make fix`, from `src/millpond/settings.py`.*
"""

CLI_HEAD = """# Command line

`millpond <part> <verb>`. Exit status: 0 done, 1 a command that ran and failed, 2 a mistake or a refusal with one
message that says what to do, 130 after Ctrl-C. `--json` prints for machines.

*This page is written by `make fix`, from `src/millpond/cli/`.*
"""


def settings_page() -> str:
    """Return docs/reference/settings.md."""
    lines = [SETTINGS_HEAD]
    shared: set[str] = set()
    for program, settings_class in settings.PROGRAMS.items():
        lines += [f"## millpond {program}", "", "| variable | default | what it sets |", "|---|---|---|"]
        for field in dataclasses.fields(settings_class):
            variable = settings.variable_of(program, field)
            again = " (as above)" if variable in shared else ""
            shared.add(variable)
            secret = " Secret." if field.metadata["secret"] else ""
            lines.append(f"| `{variable}` | {_default(field)} | {field.metadata['help']}{secret}{again} |")
        lines.append("")
    return "\n".join(lines)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is settings.default_home:
        return "`~/.local/share/millpond`"
    return "none" if field.default in (None, "") else f"`{field.default}`"


def cli_page() -> str:
    """Return docs/reference/cli.md."""
    lines = [CLI_HEAD]
    for words, command in _commands("millpond", get_command(build([], whole=True))):
        lines += [f"## {words}", "", (command.help or command.short_help or "").strip(), ""]
        shown = [parameter for parameter in command.params if parameter.name != "help"]
        if shown:
            lines += ["| argument or option | default | |", "|---|---|---|"]
            lines += [_parameter(parameter) for parameter in shown]
            lines.append("")
    return "\n".join(lines)


def _commands(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not getattr(command, "hidden", False):
        yield words, command
        for name, inner in getattr(command, "commands", {}).items():
            yield from _commands(f"{words} {name}", inner)


def _parameter(parameter: Any) -> str:
    is_option = parameter.param_type_name == "option"
    names = ", ".join([*parameter.opts, *parameter.secondary_opts]) if is_option else parameter.name.upper()
    default = parameter.default
    shown = "required" if parameter.required else "" if default in (None, "", False) or callable(default) else default
    return f"| `{names}` | {shown} | {' '.join((parameter.help or '').split()).replace('|', '/')} |"


PAGES = {"settings.md": settings_page, "cli.md": cli_page}


def main() -> None:
    """Write the pages, or with `--check` say which is not up to date and exit with 1."""
    stale = [name for name, page in PAGES.items() if _read(REFERENCE / name) != page()]
    if "--check" not in sys.argv:
        for name in stale:
            (REFERENCE / name).write_text(PAGES[name]())
    elif stale:
        sys.exit(f"Not up to date: {', '.join(stale)} in docs/reference. Run: make fix")


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    main()
