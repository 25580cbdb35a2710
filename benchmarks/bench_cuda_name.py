"""What the name `cuda` costs a program: `millpond pool run -- python benchmarks/bench_cuda_name.py`.

Prints microseconds per call as JSON, before the program has said `cuda` and after; PyTorch's own functions beside.
"""

from __future__ import annotations

import json
import timeit

import torch

from millpond.pool import cuda

CALLS, REPEATS = 20_000, 7


def measure(statement: str, **names: object) -> float:
    """Return the best of some runs: microseconds per call."""
    runs = timeit.repeat(statement, globals={"torch": torch, **names}, number=CALLS, repeat=REPEATS)
    return round(min(runs) / CALLS * 1e6, 3)


def main() -> None:
    """Measure, and print."""
    torch.set_num_threads(1)
    host, there = torch.ones(2), torch.ones(2, device="pool")
    plain = {"x.to('cpu')": measure("to(x, 'cpu')", x=host, to=cuda._tensor_to)}
    statements = {"x.device": there, "x.is_cuda": there, "x.to('cpu')": host, "torch.zeros(2)": host}
    silent = {text: measure(text, x=x) for text, x in statements.items()}
    there.cuda()
    said = {text: measure(text, x=x) for text, x in statements.items()}
    said["torch.zeros(2)"] = measure("torch.zeros(2)")
    print(
        json.dumps({"torch": torch.__version__, "PyTorch's own": plain, "never said": silent, "said": said}, indent=1)
    )


if __name__ == "__main__":
    main()
