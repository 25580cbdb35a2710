"""Upload and download of 1 GiB between a program's memory and the pool, against iperf3 on the same link.

With TLS and without; over two network namespaces as they come, and held to 10 and 1 Gbit/s. iperf3 and the pool take
turns within each round, on the same two cores. Prints a table and writes benchmarks/results/<date>-link.json and .md:

    python benchmarks/bench_link.py [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from device import links, report
from device.links import CLIENT_CORE, WORKER_CORE

RATES = ("", "10gbit", "1gbit")
IPERF_PORT = "5201"
MOVES = ("upload", "download", "download into memory that is there")
NOT_MEASURED = ["GPU memory at the worker", "two machines: all links here are within one", "RoCE and InfiniBand"]


# --- in the program under a lease ------------------------------------------------------------------------------------


def measure(size: int, rounds: int, address: str) -> list[dict[str, Any]]:
    """Return what each round found, in GB/s and in seconds of processor for a GB, here and at the other end."""
    import torch

    worker = psutil.Process(int(str(links.pin_worker()["pid"])))
    host = torch.ones(size, dtype=torch.uint8)
    there = torch.empty(size, dtype=torch.uint8, device="pool")
    moves: dict[str, Callable[[], Any]] = {
        "upload": lambda: (there.copy_(host), there[:1].cpu()),
        "download": there.cpu,
        "download into memory that is there": lambda: host.copy_(there),
    }
    found = []
    for _ in range(rounds):
        one: dict[str, Any] = {
            "iperf3 upload": iperf(address, size),
            "iperf3 download": iperf(address, size, "--reverse"),
        }
        for name, move in moves.items():
            before = time.perf_counter(), time.process_time(), sum(worker.cpu_times()[:2])
            move()
            after = time.perf_counter(), time.process_time(), sum(worker.cpu_times()[:2])
            seconds, ours, theirs = (late - early for late, early in zip(after, before, strict=True))
            one[name] = rates(size, seconds, ours, theirs)
        found.append(one)
        print(
            f"  {one['iperf3 upload']['GB/s']}, {one['iperf3 download']['GB/s']} GB/s by iperf3; "
            f"{', '.join(str(one[name]['GB/s']) for name in MOVES)}",
            file=sys.stderr,
            flush=True,
        )
    return found


def iperf(address: str, size: int, *options: str) -> dict[str, float]:
    command = ["iperf3", "--client", address, "--port", IPERF_PORT, "--bytes", str(size), "--json", *options]
    for _ in range(50):
        said = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=300).stdout)
        if "error" not in said:
            break
        time.sleep(0.2)  # the server is not up yet, or still ends its last test
    received, used = said["end"]["sum_received"], said["end"]["cpu_utilization_percent"]
    ours, theirs = (used[f"{end}_total"] / 100 * received["seconds"] for end in ("host", "remote"))
    return rates(received["bytes"], received["seconds"], ours, theirs)


def rates(size: int, seconds: float, ours: float, theirs: float) -> dict[str, float]:
    per_gb = {"client CPU s/GB": ours, "worker CPU s/GB": theirs}
    return {"GB/s": round(size / seconds / 1e9, 4)} | {name: round(s / size * 1e9, 3) for name, s in per_gb.items()}


# --- the run ---------------------------------------------------------------------------------------------------------


def over(rate: str, with_tls: bool, size: int, rounds: int) -> list[dict[str, Any]]:
    print(f"{rate or 'no limit'}, {'TLS' if with_tls else 'plain'}", file=sys.stderr, flush=True)
    with links.network(rate) as there, iperf_server(there), links.pool(there, with_tls=with_tls) as environment:
        command = [*there.client, *links.MILLPOND, "run", "--", sys.executable, __file__, "--measure", there.address]
        command += ["--size", str(size), "--rounds", str(rounds)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=1800)
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@contextlib.contextmanager
def iperf_server(there: links.Network) -> Iterator[None]:
    command = [*there.pool, "taskset", "-c", str(WORKER_CORE), "iperf3", "--server", "--port", IPERF_PORT]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as serving:
        try:
            yield
        finally:
            serving.terminate()


def run(size: int, rounds: int) -> None:
    lacking = [*links.missing(), *(["iperf3"] if shutil.which("iperf3") is None else [])]
    if lacking:
        raise SystemExit(f"bench_link needs what is missing here: {', '.join(lacking)} (Debian: iproute2, iperf3)")
    result = report.about() | {"pinned": {"worker": WORKER_CORE, "client": CLIENT_CORE}, "bytes": size}
    result["links"] = {
        f"{rate or 'no limit'}, {'TLS' if with_tls else 'plain'}": over(rate, with_tls, size, rounds)
        for rate in RATES
        for with_tls in (False, True)
    }
    result |= {"not_measured": NOT_MEASURED, "load_average_at_end": os.getloadavg()}
    report.write(result, "link", page(result))


def page(result: dict[str, Any]) -> list[str]:
    """Return the result as lines of Markdown."""
    rounds = len(next(iter(result["links"].values())))
    lines = [
        *report.heading(result, "Bytes to the pool and back"),
        f"{result['bytes'] / 2**30:g} GiB between a program's memory and a CPU worker's, on a core each, iperf3 on the "
        f"same two; {rounds} rounds in turns. A ratio is the median over the rounds of pool by iperf3 in the same "
        "round, and in brackets that of the best of each. Processor seconds are the least in any round, for a GB.",
        "",
        "| link | what | iperf3 GB/s, best | pool GB/s, best | pool / iperf3 | client CPU s/GB, iperf3 | pool | worker "
        "CPU s/GB, iperf3 | pool |",
        "|" + "---|" * 9,
    ]
    for link, found in result["links"].items():
        for name in MOVES:
            beside = "iperf3 upload" if name == "upload" else "iperf3 download"
            best, theirs = (max(one[what]["GB/s"] for one in found) for what in (name, beside))
            ratio = statistics.median(one[name]["GB/s"] / one[beside]["GB/s"] for one in found)
            cells = [link, name, theirs, best, f"{ratio:.0%} ({best / theirs:.0%})"]
            for end in ("client", "worker"):
                cells += [min(one[what][f"{end} CPU s/GB"] for one in found) for what in (beside, name)]
            lines.append("| " + " | ".join(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return [*lines, "", "Not yet measured:", "", *(f"- {what}" for what in result["not_measured"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 MiB, 3 rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=2**30, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size, rounds = (2**26, 3) if options.quick else (options.size, options.rounds)
    if options.measure:
        print(json.dumps(measure(size, rounds, options.measure)))
    else:
        run(size, rounds)


if __name__ == "__main__":
    main()
