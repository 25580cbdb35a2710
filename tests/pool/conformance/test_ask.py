"""The list of ops that a worker is asked about is complete."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from millpond.pool.plan import ASK


@pytest.mark.slow
def test_every_op_whose_meta_kernel_is_wrong_is_asked_about():
    """15 s of one core, most of it in PyTorch's own operators."""
    program = Path(__file__).parent / "beliefs.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    differences = json.loads(done.stdout)
    wrong = {name for name, kinds in differences.items() if "geometry" in kinds or "error" in kinds}
    assert "aten::native_batch_norm" in wrong, "the sweep sees what it is meant to see"
    assert wrong <= ASK
