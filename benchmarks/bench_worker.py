"""What a worker spends on an op beyond the op: one alone, and as a step of a captured graph, beside PyTorch's own.

Prints microseconds per op as JSON, the best of several rounds, all in one process on the CPU:

    python benchmarks/bench_worker.py
"""

from __future__ import annotations

import json
import timeit
from collections.abc import Callable
from typing import Any

import torch

from millpond.pool import numerics, wire
from millpond.pool.executor import Memory
from millpond.pool.graphs import GraphExecutor

OPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "relu": ("aten::relu", torch.relu),
    "mul": ("aten::mul.Tensor", torch.mul),
    "mm": ("aten::mm", torch.mm),
}
SIDE = 8
OPS_OF_BATCH = 128
ROUNDS, BATCHES = 15, 30
NOTHING = memoryview(b"")


def best(run: Callable[[], Any], ops: int) -> float:
    """Return the microseconds of an op when `run` does so many of them."""
    return round(min(timeit.repeat(run, number=BATCHES, repeat=ROUNDS)) / BATCHES / ops * 1e6, 2)


def measure(name: str) -> dict[str, float]:
    """Measure an op on small matrices."""
    full, plain = OPS[name]
    matrix = wire.Geometry("float32", (SIDE, SIDE), (SIDE, 1))
    count = 1 if name == "relu" else 2
    operands = [wire.Operand(slot) for slot in range(count)]
    define = wire.Define(0, full, operands, {}, [matrix], numerics.described(numerics.current()))
    puts = [wire.Put(handle, "float32", [SIDE, SIDE], bytes(4 * SIDE * SIDE)) for handle in (1, 2)]
    steps = [wire.Step(0, [max(0, 1 + step) if step else 0, 1][:count], []) for step in range(OPS_OF_BATCH)]
    graph = wire.DefineGraph(0, [matrix, matrix], steps, [1 + OPS_OF_BATCH])
    calls = wire.Batch([wire.Call(0, [1, 2][:count], 10 + call, []) for call in range(OPS_OF_BATCH)])
    run = wire.Batch([wire.Run(0, [1, 2], 10)])
    executor = GraphExecutor(torch.device("cpu"), Memory(2**30))
    x = torch.zeros(SIDE, SIDE)
    with torch.inference_mode():
        for batch in (wire.Batch([*puts, define, graph]), calls, run):
            if failures := list(executor.run(batch, NOTHING)):
                raise SystemExit(f"{name} failed: {failures}")
        return {
            "alone": best(lambda: list(executor.run(calls, NOTHING)), OPS_OF_BATCH),
            "captured": best(lambda: list(executor.run(run, NOTHING)), OPS_OF_BATCH),
            "PyTorch": best(lambda: [plain(*[x] * count) for _ in range(OPS_OF_BATCH)], OPS_OF_BATCH),
        }


def main() -> None:
    """Measure, and print."""
    torch.set_num_threads(1)
    print(json.dumps({"torch": torch.__version__, "us": {name: measure(name) for name in OPS}}, indent=1))


if __name__ == "__main__":
    main()
