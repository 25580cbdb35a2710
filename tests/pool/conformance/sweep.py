"""PyTorch's own databases of operators, modules and optimizers on the pool device, against plain CPU.

    python tests/pool/conformance/sweep.py [--kind operator] [--dtype float32 …] [--samples 4] [--only REGEX] [--page]

The worker and the program on the device are processes of their own, over a real socket; whichever dies is started
again, and the case counts as a crash. `--page` writes docs/reference/operators.md from a whole run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import select
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).parents[2]))
import rich.console
import rich.progress

from worker_site import GIB, WorkerProcess

HERE = Path(__file__).parent
LIMIT_S = 120.0
"""How long one case may take; a program that hangs is ended, and the case counts as a crash."""
KINDS = ("operator", "module", "optimizer")
COMPILED = ("compiled module", "compiled optimizer")
PAGE = HERE.parents[2] / "docs/reference/operators.md"

LACKING = {
    ("operator", "sparse.sampled_addmm"): "sparse tensors on the device are COO; this wants CSR",
    ("operator", "sparse.mm.reduce"): "sparse tensors on the device are COO; this wants CSR",
    ("compiled module", "nn.MultiLabelMarginLoss"): "PyTorch's compiler gives one unreduced loss a dimension too many",
}
"""What fails, and why; a test keeps it complete and without what works by now."""

HEAD = """# Operators on the pool device

Every operator, module and optimizer in the databases of PyTorch's own test suite (`torch.testing._internal`), result
and gradient on `pool:0` against plain CPU, bit for bit but for PyTorch's own tolerances, under the same seed, with a
worker in another process over a real socket. What is compiled goes through `torch.compile` on the pool, several times
in a row. A round trip is a wait for the worker: an operator without one streams. The figures are the most that any
sample took, from its second call on: a shape that only the worker knows is asked for once for each signature, and never
again.

*This page is written by `python tests/pool/conformance/sweep.py --dtype DTYPE … --samples 4 --page`.*
"""

Result = dict[str, Any]


class Site:
    """A worker, if `leased`, and the program that runs cases on it; started when needed, and again after a crash."""

    def __init__(self, directory: Path, *command: str, leased: bool = True) -> None:
        self.directory = directory
        self.command = command or (str(HERE / "cases.py"),)
        self.leased = leased
        self.worker: WorkerProcess | None = None
        self.program: subprocess.Popen[str] | None = None

    def run(self, case: Result) -> Result:
        """Return what came of a case."""
        if self.program is None:
            self._start()
        assert self.program is not None
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        started = time.monotonic()
        self.program.stdin.write(json.dumps(case) + "\n")
        self.program.stdin.flush()
        ready, _, _ = select.select([self.program.stdout], [], [], LIMIT_S)
        line = self.program.stdout.readline() if ready else ""
        seconds = round(time.monotonic() - started, 2)
        if line and not (result := json.loads(line)).get("lost"):
            return {**result, "seconds": seconds}
        why = json.loads(line)["message"] if line else "it took too long" if not ready else ""
        code = self._ended()
        return {**case, "outcome": "crash", "message": why or f"the program ended: {code}", "seconds": seconds}

    def _start(self) -> None:
        if self.leased:
            self.worker = WorkerProcess(4 * GIB, log=self.directory / "worker.log")
        with (self.directory / "program.log").open("ab") as log:
            self.program = subprocess.Popen(
                [sys.executable, *self.command],
                env=self.worker.environment() if self.worker is not None else None,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def _ended(self) -> str:
        assert self.program is not None
        try:
            code = f"exit status {self.program.wait(2)}"
        except subprocess.TimeoutExpired:
            code = "killed"
        self.close()
        return code

    def close(self) -> None:
        """End both."""
        if self.program is not None:
            self.program.kill()
            self.program.wait()
            for pipe in (self.program.stdin, self.program.stdout):
                if pipe is not None:
                    pipe.close()
        if self.worker is not None:
            self.worker.close()
        self.program = self.worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def share(found: Iterable[str], percent: int) -> list[str]:
    """Return a fixed share of the names, by their hash: the same ones on every machine."""
    return [name for name in found if zlib.crc32(name.encode()) % 100 < percent]


def sweep(site: Site, kind: str, dtype: str, *, percent: int = 100, samples: int = 0, only: str = "") -> list[Result]:
    """Return what came of each case of a database, in its order; show how far it is."""
    (found,) = [site.run({"kind": kind, "dtype": dtype})["names"]]
    chosen = share([name for name in found if re.search(only, name)], percent)
    shown = rich.progress.track(chosen, f"{kind} {dtype}", console=rich.console.Console(stderr=True))
    return [site.run({"kind": kind, "name": name, "dtype": dtype, "samples": samples}) for name in shown]


def row(results: list[Result]) -> str:
    """Return the page's line about a database and a dtype."""
    counts = Counter(result["outcome"] for result in results)
    lacking = len(results) - counts["pass"] - counts["skipped"]
    return f"| {results[0]['kind']}s | {results[0]['dtype']} | {counts['pass']} | {lacking} | {counts['skipped']} |"


def _by_database(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    by_database: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        by_database.setdefault((result["kind"], result["dtype"]), []).append(result)
    return by_database


def page(results: Iterable[Result]) -> str:
    """Return docs/reference/operators.md."""
    by_database = _by_database(results)
    lines = [HEAD, "## What is not there", "", "| | | reason |", "|---|---|---|"]
    lines += [f"| {kind} | `{name}` | {reason} |" for (kind, name), reason in LACKING.items()]
    lines += [
        "",
        "## What came of the run",
        "",
        "| | dtype | agree | lacking | plain CPU lacks it too |",
        "|---|---|---|---|---|",
        *(row(those) for those in by_database.values()),
    ]
    uncaptured = [
        f"{result['kind'].removeprefix('compiled ')} `{result['name']}`"
        for result in results
        if result["kind"] in COMPILED and result["outcome"] == "pass" and result["message"]
    ]
    if uncaptured:
        why = "Compiled, these run op by op in whole or in part, and a line in the log says why"
        lines += ["", f"{why}: {', '.join(uncaptured)}."]
    for (kind, dtype), those in by_database.items():
        if dtype != "float32":
            continue  # the same round trips again
        waiting = [r for r in those if r["outcome"] == "pass" and (r["forward"] or r["backward"])]
        free = [f"`{r['name']}`" for r in those if r["outcome"] == "pass" and r not in waiting]
        lines += ["", f"## Round trips: {kind}s", "", f"| {kind} | forward | backward |", "|---|---|---|"]
        lines += [f"| `{r['name']}` | {r['forward']} | {r['backward']} |" for r in waiting]
        lines += ["", f"None: {', '.join(free)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what the arguments say; print a line per case that did not pass, and the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=KINDS + COMPILED, action="append")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--samples", type=int, default=0, help="most samples per case; 0: all")
    parser.add_argument("--only", default="", help="a regular expression for names")
    parser.add_argument("--percent", type=int, default=100, help="a fixed share of the cases")
    parser.add_argument("--json", type=Path, help="where the results go, a line per case")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.relative_to(PAGE.parents[2])}")
    options = parser.parse_args()
    results: list[Result] = []
    cases = itertools.product(options.dtype, options.kind or KINDS)
    if not options.kind:
        cases = itertools.chain(cases, itertools.product(["float32"], COMPILED))
    with tempfile.TemporaryDirectory() as directory, Site(Path(directory)) as site:
        for dtype, kind in cases:
            those = sweep(site, kind, dtype, percent=options.percent, samples=options.samples, only=options.only)
            for result in those:
                if result["outcome"] not in ("pass", "skipped"):
                    print(f"{result['outcome']:8} {result['name']} ({result['seconds']} s): {result['message'][:600]}")
            counts = Counter(result["outcome"] for result in those)
            print(f"{kind} {dtype}: {dict(counts)} of {len(those)}", flush=True)
            results += those
    if options.json:
        options.json.write_text("".join(json.dumps(result) + "\n" for result in results))
    if options.page:
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
