"""Send a worker's end of a session what hostile clients may send: any number of frames, repeatable by a seed.

    python tests/attacks/fuzz_pool_wire.py [--frames 1000000] [--seed 0] [--way samples] [--ops REGEX] [--only SESSION]

The frames run in a process of their own, under the limits of a worker, in tensors that end at a guard page: a kernel
that reads or writes beyond an operand ends the process, which is noted, and the next session goes on in a new one.
Whatever is not an orderly refusal is printed with the number of its session, and `--only` repeats it, given the same
other options. The exit code is 1 if there was any.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import functools
import mmap
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import msgspec
import torch

from attacks import pool_frames, pool_samples
from attacks.pool_frames import Frame
from millpond.pool import wire
from millpond.pool.errors import WireError
from millpond.pool.executor import Executor, Memory, Plan
from millpond.pool.graphs import GraphExecutor

LEASE_BYTES = 64 * 2**20
DATA_BYTES = 2**30
"""What the process may take beyond what it began with."""
SAMPLES_OF_SESSION = 20
LIMIT_S = 20.0
"""How long one frame may take."""
PAGE = mmap.PAGESIZE


class GuardedExecutor(GraphExecutor):
    """An executor whose small tensors end at a page that nobody may touch."""

    def _keep(self, handle: int, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if 0 < storage.nbytes() <= 4 * PAGE and tensor.storage_offset() == 0 and not tensor.is_quantized:
            guarded = torch.frombuffer(_guarded(storage.nbytes()), dtype=torch.uint8).untyped_storage()
            guarded.copy_(storage)
            tensor = torch.empty(0, dtype=tensor.dtype).set_(guarded, 0, tensor.shape, tensor.stride())  # type: ignore[call-overload]
        super()._keep(handle, tensor)


_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _guarded(size: int) -> memoryview:
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + PAGE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages
    if _mprotect(end, PAGE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    start = pages - -(-size // 16) * 16  # aligned as kernels may expect
    return memoryview(memory)[start : start + size]


def run_session(frames: Iterable[Frame], memory: Memory, kind: type[Executor] = GuardedExecutor) -> Counter[str]:
    """Run a session's frames as a worker does; raises AssertionError, or whatever it is, for what no worker may do."""
    outcomes: Counter[str] = Counter()
    executor = kind(torch.device("cpu"), memory)
    try:
        for header, payload in frames:
            outcomes["frames"] += 1
            started = time.monotonic()
            try:
                batch = wire.decode(header, "to-worker")
                place = executor.destination(batch, len(payload)) if payload else memoryview(b"")
                if payload:
                    place[:] = payload
                for answer, _data in executor.run(batch, place):  # type: ignore[arg-type]
                    encoded = wire.encode(answer)[wire.PREFIX.size :]
                    assert len(encoded) <= wire.MAX_HEADER_BYTES
                    wire.decode(encoded, "from-worker")
                    outcomes[answer.kind if isinstance(answer, wire.Failed) else "answered"] += 1
            except WireError:
                outcomes["ended"] += 1
                break
            finally:
                took = time.monotonic() - started
            assert took < LIMIT_S, f"a frame took {took:.1f} s"
            assert memory.used_bytes == sum(executor._sizes.values()), "memory is counted wrongly"
            assert memory.used_bytes <= memory.limit_bytes, "the lease is exceeded"
    finally:
        executor.close()
    assert memory.used_bytes == 0, f"{memory.used_bytes} bytes stay counted after a session"
    return outcomes


class Board:
    """What the running process tells the one that watches it, in memory that outlives it."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 8 * PAGE)

    def write(self, session: int, frames: int, text: str) -> None:
        data = msgspec.msgpack.encode((session, frames, text[-7 * PAGE :]))
        self.memory[: 8 + len(data)] = len(data).to_bytes(8, "little") + data

    def name_op(self, name: str) -> None:
        self.memory[-PAGE : -PAGE + 256] = name.encode().ljust(256, b"\0")

    def op(self) -> str:
        return self.memory[-PAGE : -PAGE + 256].rstrip(b"\0").decode()

    def read(self) -> tuple[int, int, str]:
        size = int.from_bytes(self.memory[:8], "little")
        try:
            return msgspec.msgpack.decode(self.memory[8 : 8 + size], type=tuple[int, int, str])
        except msgspec.DecodeError:  # it is being written
            return -1, 0, ""


class Tally:
    """How often each op was run, and ran to its end: counted by processes that may crash, in memory that does not."""

    def __init__(self) -> None:
        self.places = {name: place for place, name in enumerate(pool_frames.op_names())}
        self.counts = memoryview(mmap.mmap(-1, 16 * len(self.places))).cast("Q")

    def count(self, name: str, *, ended: bool) -> None:
        self.counts[2 * self.places[name] + ended] += 1

    def __str__(self) -> str:
        started, ended = self.counts[::2].tolist(), self.counts[1::2].tolist()
        some, whole = (sum(count > 0 for count in counts) for counts in (started, ended))
        return (
            f"{sum(started)} times an op was run, {some} of {len(self.places)} ops; "
            f"{sum(ended)} times to its end, {whole} ops"
        )


def frames_of(seed: int, session: int, recorded: Sequence[Frame], way: str | None) -> Iterator[Frame]:
    return pool_frames.session(Random(f"{seed}/{session}"), recorded, way)


def samples_of(seed: int, session: int, calls: Sequence[Sequence[pool_samples.Call]]) -> Iterator[Frame]:
    chance = Random(f"{seed}/{session}")
    for _ in range(SAMPLES_OF_SESSION):
        yield pool_samples.altered(chance.choice(chance.choice(calls)), chance)


def _run(
    board: Board,
    tally: Tally,
    first: int,
    last: int,
    most: int,
    frames: Callable[[int], Iterator[Frame]],
    log: Path,
) -> None:
    """Run sessions from `first`, in a process of their own; append what is wrong to the log."""
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 2)
    os.dup2(2, 1)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**24, 2**24))
    used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_DATA, (used + DATA_BYTES, used + DATA_BYTES))
    memory = Memory(LEASE_BYTES)
    done = 0
    number = first

    def told(frames: Iterable[Frame]) -> Iterator[Frame]:
        nonlocal done
        for header, payload in frames:
            done += 1
            with contextlib.suppress(WireError):
                board.write(number, done, repr(wire.decode(header, "to-worker"))[-20_000:])
            yield header, payload

    run_plan = Plan.run

    def named(plan: Plan, *arguments: Any) -> Any:
        board.name_op(plan.name)
        tally.count(plan.name, ended=False)
        try:
            results = run_plan(plan, *arguments)
            tally.count(plan.name, ended=True)
            return results
        finally:
            board.name_op("")

    Plan.run = named  # type: ignore[method-assign]
    with torch.inference_mode():
        for number in range(first, last):
            board.write(number, done, "")
            try:
                run_session(told(frames(number)), memory)
            except Exception:
                print(f"SESSION {number}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                memory = Memory(LEASE_BYTES)
            if done >= most:
                break
    board.write(last, done, "")
    os._exit(0)


def fuzz(
    frames: int,
    seed: int,
    *,
    tally: Tally,
    way: str | None = None,
    every: int = 1,
    only: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[str]:
    """Run `frames` frames, samples of each `every`-th operator; yield what is wrong, each with the session of it."""
    torch.set_num_threads(1)
    torch.ones(64, 64).matmul(torch.ones(64, 64))  # what is made at first use is made before the limits
    of_session: Callable[[int], Iterator[Frame]]
    if way == pool_frames.SAMPLES:
        named = set(pool_frames.op_names())
        of_session = functools.partial(
            samples_of, seed, calls=[calls for calls in pool_samples.record(every) if calls[0].op in named]
        )
    else:
        of_session = functools.partial(frames_of, seed, recorded=pool_frames.well_meant(), way=way)
    forked = multiprocessing.get_context("fork")
    done, first = 0, only or 0
    while done < frames:
        board = Board()
        board.write(first, 0, "")
        with tempfile.TemporaryDirectory() as directory:
            log = Path(directory) / "log"
            last = first + 1 if only is not None else 2**40
            process = forked.Process(
                target=_run, args=(board, tally, first, last, frames - done, of_session, log), daemon=True
            )
            process.start()
            seen, since, hung = (-1, -1), time.monotonic(), False
            while process.is_alive():
                process.join(0.2)
                session, count, _ = board.read()
                if session >= 0 and (session, count) != seen:
                    seen, since = (session, count), time.monotonic()
                    progress(done + count)
                elif time.monotonic() - since > LIMIT_S:
                    hung = True
                    process.kill()
            session, count, text = board.read()
            said = log.read_text(errors="replace") if log.exists() else ""
        *wrong, tail = said.split("SESSION ")
        yield from (f"session {each.strip()}" for each in wrong[1:])
        if process.exitcode != 0:
            code = process.exitcode or 0
            how = "hung" if hung else signal.Signals(-code).name if code < 0 else f"exited with {code}"
            yield f"session {session}: {how} in {board.op() or 'no op'}; frame {count} was {text}\n{tail[-600:]}"
        elif wrong:
            yield f"session {tail.strip()}"
        done += max(count, 1)
        progress(done)
        first = session + 1
        if only is not None:
            break


def main() -> int:
    """Fuzz, with a progress bar."""
    import rich.progress

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000, help="how many frames to send (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other frames (default: %(default)s)")
    parser.add_argument("--only", type=int, metavar="SESSION", help="repeat one session")
    parser.add_argument("--ops", help="only ops whose names match this regular expression")
    parser.add_argument(
        "--way", choices=(*pool_frames.WAYS, pool_frames.SAMPLES), help="only sessions of one kind (default: all)"
    )
    options = parser.parse_args()
    if options.ops:
        names = [name for name in pool_frames.op_names() if re.search(options.ops, name)]
        if not names:
            parser.error(f"no op that the pool runs matches {options.ops!r}")
        pool_frames.op_names = lambda: names  # type: ignore[assignment]
    started = time.monotonic()
    found = sent = 0
    tally = Tally()
    with rich.progress.Progress(auto_refresh=False) as bar:  # a thread beside would not survive a fork
        task = bar.add_task("frames", total=options.frames)

        def progress(done: int) -> None:
            nonlocal sent
            sent = done
            bar.update(task, completed=done, refresh=True)

        with contextlib.suppress(KeyboardInterrupt):  # what was found so far is worth knowing
            for defect in fuzz(
                options.frames, options.seed, tally=tally, way=options.way, only=options.only, progress=progress
            ):
                found += 1
                bar.console.print(defect, end="\n\n", markup=False, highlight=False, soft_wrap=True)
    took_s = time.monotonic() - started
    print(f"{sent} frames with seed {options.seed} in {took_s:.0f} s: {tally}: {found} defects")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
