"""PyTorch's own device-generic tests on the pool device, beside plain CPU.

    MILLPOND_TORCH_TESTS=DIR python tests/pool/conformance/device_generic.py [FILE …] [--only REGEX] [--json F] [--page]

DIR holds test files of PyTorch's source tree (`test/test_view_ops.py`, …) as of the torch that is installed; they are
no part of this repository. The worker and the program on the device are processes of their own, over a real socket.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import rich.console
import rich.progress
import torch

from pool.conformance.sweep import HERE, Result, Site

PAGE = HERE.parents[2] / "docs/reference/device-generic-tests.md"
FILES = (
    *("test_view_ops.py", "test_shape_ops.py", "test_type_promotion.py", "test_indexing.py", "test_sort_and_select.py"),
    *("test_torch.py", "test_nn.py", "test_autograd.py", "test_reductions.py", "test_tensor_creation_ops.py"),
    *("test_convolution.py", "test_pooling.py", "test_dropout.py", "test_embedding.py"),
    *("test_multihead_attention.py", "test_eager_transforms.py", "test_vmap.py"),
)
"""What is run unless others are named."""

LEFT_OUT = "large|64bit|OpInfo|test_linspace_[cfi]"
"""Tests that are not run: they need the memory of a GPU, read a million elements one by one, or are the sweep's."""

DTYPES = r"bool|b?float\d+|u?int\d+|complex\d+"

HEAD = """# PyTorch's device-generic tests on the pool device

PyTorch's test suite writes many of its tests once for all devices (`torch.testing._internal.common_device_type`). Here
they are run on `pool:0`, with a CPU worker in another process over a real socket, and on plain CPU; only what passes on
plain CPU counts. Each op is waited for (`CUDA_LAUNCH_BLOCKING=1`), as the tests expect an error of the very call.

Left out are tests of tensors beyond the machine's memory, some that read a million elements one by one, and those that
run each operator of PyTorch's database, which [operators](operators.md) has. What is skipped are tests that PyTorch has
for its own devices alone. The files were those of about the same version, as ports of PyTorch to other devices have
them.

*This page is written by `python tests/pool/conformance/device_generic.py FILE … --page`, of PyTorch's test files.*
"""

REASONS = {
    "quantize": "quantized tensors are not on the pool",
    "strided layout|Nested": "nested tensors of the strided layout are not on the pool",
    "LeaseOutOfMemory|out of memory": "it needs more than the lease's 4 GiB",
    "up to 64 dims": "a tensor on the wire has 64 dimensions at most",
    "part of a storage": "parts of storages are refused; parts of tensors are not",
    "_cow_|_lazy_clone|storage_meta_errors|tensor_storage_type|map2?_ is only": "it asks for what a CPU has",
    "the memory of a tensor": "another library cannot have the memory of a tensor that is elsewhere",
    "not triggered|no warning": "a warning of the worker's kernel is not passed on",
    "passed where a failure": "it passes on the pool, where PyTorch expects a failure",
    "does not match": "the same error in other words",
    "HigherOrderOperator": "the test's own operator is for the devices that it names",
    "nonsupported_dtypes|grad_and_gradgrad": "it expects of a GPU an error that a CPU worker has no cause for",
    "grad_?scal|alert_median": "it goes by the name of the device, which is two here: pool and cuda",
    "feature_alpha_dropout": "it asks that some features are dropped and some are not, which this seed does not give",
    "transformerencoderlayer": "rows that are masked whole are zeros, and not what a GPU's fast path has",
    "max_pool3d_ndhwc": "the result of one volume without a batch is contiguous, where it could be channels last",
    "fast_path_mock": "the module's fast path is for the devices that PyTorch names",
}
"""Why a test fails that is not to be mended: by a regular expression for its name or message."""


def compare(file: Path, directory: Path, only: str = "") -> list[Result]:
    """Return what came of each test of a file that passes on plain CPU, on the pool; show how far it is."""
    program = str(HERE / "generic_tests.py")
    console = rich.console.Console(stderr=True)
    with (
        Site(directory, program, str(file), "cpu", leased=False) as host,
        Site(directory, program, str(file), "pool") as pool,
    ):
        both = set(_names(pool, file))
        names = [
            name
            for name in _names(host, file)
            if name in both and re.search(only, name) and not re.search(LEFT_OUT, name)
        ]
        shown = rich.progress.track(names, file.name, console=console)
        counted = [name for name in shown if host.run({"name": name})["outcome"] == "pass"]
        shown = rich.progress.track(counted, f"{file.name} on the pool", console=console)
        return [{"file": file.name, **pool.run({"name": name})} for name in shown]


def _names(site: Site, file: Path) -> list[str]:
    answer = site.run({})
    if "names" not in answer:
        log = (site.directory / "program.log").read_text().strip()
        raise SystemExit(f"{file} cannot be loaded: {log.splitlines()[-1] if log else answer['message']}")
    return answer["names"]  # type: ignore[no-any-return]


def row(file: str, results: Sequence[Result]) -> str:
    """Return the page's line about a file."""
    counts = Counter(result["outcome"] for result in results)
    failed = len(results) - counts["pass"] - counts["skipped"]
    return f"| `{file}` | {len(results)} | {counts['pass']} | {failed} | {counts['skipped']} |"


def reason(result: Result) -> str:
    """Return why a test fails, as the page says it: what is known of it, or the first line of its error."""
    for pattern, why in REASONS.items():
        if re.search(pattern, result["name"]) or re.search(pattern, result["message"]):
            return why
    return result["message"].splitlines()[0].replace("|", "\\|")[:160]


def page(results: dict[str, list[Result]]) -> str:
    """Return docs/reference/device-generic-tests.md."""
    lines = [HEAD, f"torch {torch.__version__.partition('+')[0]}.", ""]
    lines += ["| file | pass on plain CPU | on the pool | fail | skipped |", "|---|---|---|---|---|"]
    lines += [row(file, those) for file, those in results.items()]
    for file, those in results.items():
        failed: dict[str, dict[str, int]] = {}
        for result in those:
            if result["outcome"] not in ("pass", "skipped"):
                name = re.sub(rf"(_({DTYPES}))+$", "", result["name"].partition(".")[2])
                names = failed.setdefault(reason(result), {})
                names[name] = names.get(name, 0) + 1
        if failed:
            lines += ["", f"## {file}", "", "| why | tests |", "|---|---|"]
            for why, names in sorted(failed.items(), key=lambda each: -sum(each[1].values())):
                shown = (f"`{name}`" + (f" ({count} dtypes)" if count > 1 else "") for name, count in names.items())
                lines.append(f"| {why} | {', '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what the arguments say; print a line per test that fails on the pool, and the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", default=FILES, help="names of files in MILLPOND_TORCH_TESTS")
    parser.add_argument("--only", default="", help="a regular expression for names")
    parser.add_argument("--json", type=Path, help="where the results go, a line per test")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.relative_to(PAGE.parents[2])}")
    options = parser.parse_args()
    if not (tests := os.environ.get("MILLPOND_TORCH_TESTS")):
        parser.error("MILLPOND_TORCH_TESTS names no directory: take PyTorch's test files from its source tree")
    results: dict[str, list[Result]] = {}
    for name in options.files:
        with tempfile.TemporaryDirectory() as directory:
            those = results[name] = compare(Path(tests) / name, Path(directory), options.only)
        for result in those:
            if result["outcome"] not in ("pass", "skipped"):
                print(f"{result['outcome']} {result['name']} ({result['seconds']} s): {result['message'][:600]}")
        print(row(name, those), flush=True)
        if options.json:
            options.json.write_text("".join(json.dumps(r) + "\n" for those in results.values() for r in those))
    if options.page:
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
