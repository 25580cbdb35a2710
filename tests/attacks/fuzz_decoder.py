"""Fuzz the wire's decoder, and what a worker makes of a message before anything runs, guided by coverage.

    python tests/attacks/fuzz_decoder.py [-runs=1000000] [-max_total_time=600] [DIRECTORY …]

The options are libFuzzer's; a directory keeps what was found worth keeping, for the next time. Whatever comes of any
bytes is a message, or `WireError`; a message comes back from its own encoding; plans and graphs are made or refused;
all in bounded time and memory. It stops at the first defect, leaving its bytes in a file named `crash-…`, which as an
argument repeats it. Needs atheris (in the extra `dev`, where it has a wheel: Linux on x86-64, Python before 3.14).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tracemalloc
import zlib
from pathlib import Path
from random import Random
from typing import Any, get_args

import atheris
import msgspec
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["millpond"]):
    from millpond.pool import codec, executor, graphs, wire
    from millpond.pool.errors import WireError
from attacks import pool_frames

DIRECTIONS: tuple[wire.Direction, ...] = get_args(wire.Direction)
OPTIONS = ("-timeout=10", "-rss_limit_mb=2048", "-max_len=4096", "-print_final_stats=1")
LARGEST = 64
"""Bytes of memory that a byte of a message may take: a small number in a list takes 8, an empty list in one 64."""
SMALLEST = 64 * 1024
CPU = torch.device("cpu")
_places = [atheris._reserve_counter() for _ in range(1 << 14)]
"""The decoder is not Python, so what it says is taken for coverage: where in which message it stopped, and why."""


def one_input(data: bytes) -> None:
    """Check everything that must hold of any bytes."""
    if len(data) >= 1 + wire.PREFIX.size:
        try:
            header, payload = wire.measure(data[1 : 1 + wire.PREFIX.size], greeted=data[0] < 128)
            assert 0 < header <= wire.MAX_HEADER_BYTES
            assert 0 <= payload <= wire.MAX_PAYLOAD_BYTES
        except WireError:
            pass
    if data:
        direction = DIRECTIONS[data[0] % len(DIRECTIONS)]
        weighed = zlib.crc32(data) % 64 == 0
        if weighed:
            tracemalloc.start()
        try:
            message = wire.decode(data[1:], direction)
        except WireError as error:
            _reached(direction, re.sub(r"[0-9]+", "", str(error)))
            return
        finally:
            if weighed:
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
                assert peak <= LARGEST * len(data) + SMALLEST, f"{peak} bytes for a message of {len(data)}"
        encoded = wire.encode(message)[wire.PREFIX.size :]
        again = wire.decode(encoded, direction)
        assert wire.encode(again)[wire.PREFIX.size :] == encoded
        assert again == message or b"nan" in repr(message).encode()
        _reached(direction, type(message).__name__)
        if isinstance(message, wire.Batch):
            prepare(message)


def prepare(batch: wire.Batch) -> None:
    """Take a batch's items as far as a worker does before it runs an op."""
    plans: dict[int, executor.Plan | executor.Failure] = {}
    for item in batch.items[:100]:
        outcome = "made"
        try:
            if isinstance(item, wire.Define):
                plans[item.plan] = executor.Plan(item, CPU)
            elif isinstance(item, wire.DefineGraph):
                graphs.Graph(item, plans)
            elif isinstance(item, wire.Put):
                codec.extent(item.sizes, executor._contiguous(item.sizes)) * codec.dtype(item.dtype).itemsize
            elif isinstance(item, wire.Receive):
                executor.Believed(item.geometry)
            elif isinstance(item, wire.Call | wire.Ask):
                for number in item.numbers:
                    codec.number(codec.from_number(number))
        except WireError as error:
            outcome = re.sub(r"[0-9]+", "", str(error))[:40]
        except Exception as error:
            outcome = executor.failure_of(error).kind
        _reached(type(item).__name__, outcome)


def _reached(*place: str) -> None:
    atheris._trace_branch(_places[zlib.crc32(repr(place).encode()) % len(_places)])


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change bytes as libFuzzer does, or one value of a message, which then still is MessagePack."""
    chance = Random(seed)
    if len(data) > 1 and chance.random() < 0.5:
        try:
            header, _ = pool_frames.with_other_values((data[1:], b""), chance)
        except (msgspec.MsgspecError, UnicodeError, IndexError, TypeError, ValueError, OverflowError, RecursionError):
            pass
        else:
            return (data[:1] + header)[:max_size]
    return bytes(atheris.Mutate(data, max_size))


def seeds() -> list[bytes]:
    """Return what well-meant ends send, and messages of every kind."""
    chance = Random(0)
    found = [bytes([DIRECTIONS.index("to-worker")]) + header for header, _ in pool_frames.well_meant()]
    for name in pool_frames.op_names()[::20]:
        batch = wire.Batch(list(pool_frames.call(name, chance, 0)))
        found.append(bytes([DIRECTIONS.index("to-worker")]) + wire.encode(batch)[wire.PREFIX.size :])
    for place, direction in enumerate(DIRECTIONS):
        for _ in range(60):
            message: Any = pool_frames.any_message(direction, chance)
            found.append(bytes([place]) + wire.encode(message)[wire.PREFIX.size :])
    return [seed for seed in found if len(seed) <= 4096]


def main() -> int:
    """Fuzz in a process of its own, which libFuzzer ends; returns its exit code."""
    if sys.argv[1:2] == ["--child"]:
        atheris.Setup([sys.argv[0], *sys.argv[2:]], one_input, custom_mutator=mutate)
        atheris.Fuzz()
    with tempfile.TemporaryDirectory() as directory:
        for place, seed in enumerate(seeds()):
            (Path(directory) / f"{place:04}").write_bytes(seed)
        files = any(Path(argument).is_file() for argument in sys.argv[1:])
        corpus = [] if files else [directory]
        return subprocess.run(
            [sys.executable, __file__, "--child", *OPTIONS, *sys.argv[1:], *corpus], check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
