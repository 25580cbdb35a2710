"""Runs a program on the host as if that had an accelerator, whose draws come from a generator of its own.

    python as_if_accelerated.py "OP …" SCRIPT [ARGUMENTS]

The ops are those by which the program draws on the device; all others draw from the host's generator. Both begin with
the same seed, as PyTorch's do. A worker that is a CPU then draws the very numbers that this run does.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class TwoGenerators(TorchDispatchMode):
    """Gives certain ops the other generator while it is entered; in forked processes, none."""

    def __init__(self, ops: set[str]) -> None:
        super().__init__()
        self.ops = ops
        self.process = os.getpid()
        self.generator = torch.Generator().manual_seed(torch.initial_seed())
        seed_host = torch.manual_seed

        def manual_seed(seed: int) -> torch.Generator:
            self.generator.manual_seed(int(seed))
            return seed_host(seed)

        torch.manual_seed = torch.random.manual_seed = manual_seed

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.overloadpacket.__name__ not in self.ops or os.getpid() != self.process:
            return op(*args, **(kwargs or {}))
        host, default = torch.get_rng_state(), torch.default_generator
        default.set_state(self.generator.get_state())
        try:
            return op(*args, **(kwargs or {}))
        finally:
            self.generator.set_state(default.get_state())
            default.set_state(host)


def pretend_to_have_an_accelerator() -> None:
    """Have the program take the path that it takes with one; it is the host's CPU."""
    torch.accelerator.is_available = lambda: True  # type: ignore[assignment]
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cpu")
    start = torch.utils.data.DataLoader.__init__

    def start_without_pinning(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{**kwargs, "pin_memory": False})

    torch.utils.data.DataLoader.__init__ = start_without_pinning  # type: ignore[method-assign]


if __name__ == "__main__":
    drawing, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    pretend_to_have_an_accelerator()
    with TwoGenerators(set(drawing.split())):
        runpy.run_path(script, run_name="__main__")
