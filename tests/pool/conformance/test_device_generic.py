"""PyTorch's device-generic tests are run on the pool beside plain CPU; their files are no part of this repository."""

from pathlib import Path

import pytest

from pool.conformance.device_generic import compare, page

FILE = """
import os
import unittest
import torch
from torch.testing._internal.common_device_type import dtypes, instantiate_device_type_tests, onlyCPU
from torch.testing._internal.common_utils import TestCase

class TestSome(TestCase):
    @dtypes(torch.float32, torch.int64)
    def test_passes(self, device, dtype):
        self.assertEqual(torch.ones(3, dtype=dtype, device=device).sum().item(), 3)

    def test_fails_on_the_pool(self, device):
        self.assertEqual(torch.device(device).type, "cpu")

    def test_fails_at_the_worker(self, device):
        index = torch.tensor([7], device=device)
        if torch.device(device).type != "cpu":
            torch.ones(3, device=device).index_select(0, index)

    def test_ends_the_process_on_the_pool(self, device):
        if torch.device(device).type != "cpu":
            os._exit(3)

    def test_fails_everywhere(self, device):
        self.fail()

    @onlyCPU
    def test_is_for_the_host(self, device):
        pass

class TestOfNoDevice(TestCase):
    def test_fails(self):
        self.fail()

instantiate_device_type_tests(TestSome, globals())
"""


@pytest.mark.slow
def test_tests_that_pass_on_the_host_are_run_on_the_pool(tmp_path: Path):
    file = tmp_path / "test_some.py"
    file.write_text(FILE)
    results = compare(file, tmp_path)
    came = {result["name"].removeprefix("TestSome.test_"): (result["outcome"], result["message"]) for result in results}
    assert {name: outcome for name, (outcome, _) in came.items()} == {
        "passes_float32": "pass",
        "passes_int64": "pass",
        "fails_on_the_pool": "fail",
        "fails_at_the_worker": "fail",
        "ends_the_process_on_the_pool": "crash",
        "is_for_the_host": "skipped",
    }
    assert came["fails_at_the_worker"][1].startswith("IndexError: index out of range")  # each op is waited for
    assert came["ends_the_process_on_the_pool"][1] == "the program ended: exit status 3"
    written = page({"test_some.py": results})
    assert "| `test_some.py` | 6 | 2 | 3 | 1 |" in written
    assert "| the program ended: exit status 3 | `test_ends_the_process_on_the_pool` |" in written
