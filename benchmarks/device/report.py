"""What every result file says besides its numbers: command, versions, machine, load; as JSON and as Markdown."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def about() -> dict[str, Any]:
    """Return what a result needs to be judged by; call it before the measurement."""
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "at": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}",
        "versions": {name: version(name) for name in ("millpond", "torch", "msgspec", "numpy")},
        "machine": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "load_average_at_start": os.getloadavg(),
        },
    }


def heading(result: dict[str, Any], title: str) -> list[str]:
    """Return the first lines of a page."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = result["machine"]
    loads = [f"{load[0]:.1f}" for load in (machine["load_average_at_start"], result["load_average_at_end"])]
    return [
        f"# {title}, {result['at'][:10]}",
        "",
        f"`{result['command']}`; {versions}; Python {machine['python']}, {machine['system']}, "
        f"{machine['cores']} cores; load {loads[0]} at the start, {loads[1]} at the end.",
        "",
    ]


def write(result: dict[str, Any], name: str, page: list[str]) -> None:
    """Write results/<date>-<name>.json and .md, and print the page."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{result['at'][:10]}-{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    path.with_suffix(".md").write_text("\n".join(page) + "\n")
    print("\n".join(page))
