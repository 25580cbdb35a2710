"""A process that runs the tests of one of PyTorch's device-generic files, each by its name: `FILE pool` or `FILE cpu`.

Tests come as JSON lines on stdin, without the device in their names; for each, one line with what came of it goes out.
It may die at any of them: see device_generic.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import unittest
import warnings
from pathlib import Path
from typing import Any

import torch

KIND = {"pool": "privateuse1", "cpu": "cpu"}
"""What PyTorch's tests call the kind of a device."""


class Outcome(unittest.TestResult):
    """Keeps the worst that came of a test."""

    def __init__(self) -> None:
        super().__init__()
        self.outcome, self.message = "pass", ""

    def _fail(self, error: Any) -> None:
        if self.outcome != "fail":
            value = error[1].__cause__ if "unexpected exception above" in str(error[1]) else error[1]
            self.outcome, self.message = "fail", f"{type(value).__name__}: {str(value).strip()}"

    def addError(self, test: Any, err: Any) -> None:
        self._fail(err)

    def addFailure(self, test: Any, err: Any) -> None:
        self._fail(err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._fail(err)

    def addSkip(self, test: Any, reason: str) -> None:
        self.outcome, self.message = "skipped", reason

    def addUnexpectedSuccess(self, test: Any) -> None:
        self.outcome, self.message = "fail", "it passed where a failure was expected"


def load(file: Path, device: str) -> dict[str, unittest.TestCase]:
    """Return the tests that a file instantiates for a device, by class and name without the device."""
    from torch.testing._internal.common_device_type import DeviceTypeTestBase

    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = {}
    for owner in vars(module).values():
        if isinstance(owner, type) and issubclass(owner, DeviceTypeTestBase) and owner.__module__ == file.stem:
            for name in unittest.defaultTestLoader.getTestCaseNames(owner):
                before, _, after = name.rpartition(f"_{device}")
                kind = owner.__name__.removesuffix(KIND[device].upper()).removesuffix(device.upper())
                tests[f"{kind}.{before}{after}"] = owner(name)
    return tests


def run(test: unittest.TestCase) -> dict[str, str]:
    """Return the outcome of a test (pass, fail, skipped) and its message."""
    result = Outcome()
    try:
        unittest.TestSuite([test]).run(result)
        if hasattr(torch, "pool"):
            torch.pool.synchronize()
    except Exception as error:  # what fails at the worker after the test has ended belongs to it
        result.outcome, result.message = "fail", result.message or f"{type(error).__name__}, late: {error}"
    return {"outcome": result.outcome, "message": result.message[:2000]}


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    file, device = Path(sys.argv[1]), sys.argv[2]
    os.environ.update(PYTORCH_TESTING_DEVICE_ONLY_FOR=KIND[device], PYTORCH_PRINT_REPRO_ON_FAILURE="0")
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # tests expect an error of the very call
    sys.argv = [str(file)]  # PyTorch's tests read it
    sys.path.insert(0, str(file.parent))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tests = load(file, device)
    for line in sys.stdin:
        case = json.loads(line)
        answer = run(tests[case["name"]]) if "name" in case else {"names": list(tests)}
        answers.write(json.dumps({**case, **answer}) + "\n")


if __name__ == "__main__":
    main()
