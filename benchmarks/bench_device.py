"""The same programs on a worker's device locally and through the pool, eager and captured, in one run, as ratios.

Worker and client are pinned to a processor core each, the local run has the worker's. A time is the best of several
rounds, as other work may go on beside. Prints a table and writes benchmarks/results/<date>-device.json and .md:

    python benchmarks/bench_device.py [--quick] [--device cuda] [--links 1 10gbit]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

from device import links, report
from device.links import CLIENT_CORE, WORKER_CORE

DELAYS_MS = ("0.05", "1", "10")
RATES = ("10gbit", "1gbit")
OVER_SLOWER = ("small, training, batch 16", "minilm, inference, batch 1")
"""What runs over each slower link: a step that waits for nothing, and one that waits for its answer."""
ROUNDS = 5
NOT_MEASURED = [
    "everything on a GPU: local against pool, eager and captured, CUDA graphs, the sizes of the references",
    "the targets of 99 % (eager, steps of 20 ms or more), 100 % and 95 % (captured) on GPU kernels",
    "on a real GPU at all: fused attention as it chooses, recurrent layers by cuDNN, graphs recorded as CUDA graphs",
    "two machines: all links here are within one; RoCE and InfiniBand",
]


# --- the measured process ------------------------------------------------------------------------------------------


def measure(device: str, kind: str, names: list[str], quick: bool) -> dict[str, Any]:
    """Measure on one device, in this process; through the pool also captured."""
    import torch

    from device import programs

    torch.set_num_threads(1)
    found: dict[str, Any] = {"steps": {}}
    wait = torch.ones(1, device=device)
    table = programs.TABLES[kind]
    for name in names or list(table)[: 3 if quick else None]:
        for how in ("eager", "captured") if device == "pool" else ("eager",):
            step = table[name](device, how == "captured")
            for _ in range(3):
                step()
            wait.cpu()
            found["steps"].setdefault(name, {})[how] = best_step(step, wait.cpu)
            print(f"  {name}, {how}: {found['steps'][name][how]['ms']} ms", file=sys.stderr, flush=True)
    if not names:
        found["op_us"] = op_times(torch, device)
    return found


def best_step(step: Callable[[], Any], wait: Callable[[], Any]) -> dict[str, float]:
    """Return the best of several rounds: milliseconds of a step, and of processor in it, here and at the worker.

    Bytes are those of the network's connection, in an average step.
    """
    started = time.perf_counter()
    step()
    wait()
    count = max(1, int(0.5 / (time.perf_counter() - started)))
    port, pid = worker()
    sent, received = links.bytes_moved(port)
    wall, processor, there = [], [], []
    for _ in range(ROUNDS):
        before, cpu, worker_cpu = time.perf_counter(), time.process_time(), processor_s(pid)
        for _ in range(count):
            step()
        wait()
        wall.append((time.perf_counter() - before) / count * 1e3)
        processor.append((time.process_time() - cpu) / count * 1e3)
        there.append((processor_s(pid) - worker_cpu) / count * 1e3)
    times = {"ms": wall, "client_cpu_ms": processor, "worker_cpu_ms": there}
    sent, received = (after - before for after, before in zip(links.bytes_moved(port), (sent, received), strict=True))
    moved = {"sent_bytes": round(sent / count / ROUNDS), "received_bytes": round(received / count / ROUNDS)}
    return {name: round(min(values), 3) for name, values in times.items()} | moved


def worker() -> tuple[int, int]:
    """Return port and process of this lease's worker; zeros without a lease."""
    workers = json.loads(os.environ.get("MILLPOND_POOL_WORKERS", "[]"))
    return (workers[0]["port"], workers[0]["pid"]) if workers else (0, 0)


def processor_s(pid: int) -> float:
    """Return what a process has used of its processor: unlike time, it does not tell what goes on beside."""
    return sum(psutil.Process(pid).cpu_times()[:2]) if pid else 0.0


def op_times(torch: Any, device: str) -> dict[str, float]:
    """Return microseconds of this thread for one op on 8 x 8, best of many rounds, nothing waited for."""
    a, b = torch.ones(8, 8, device=device), torch.ones(8, 8, device=device)
    ops = {"relu": a.relu, "add": lambda: a + b, "mm": lambda: a @ b, "view": lambda: a.view(64)}
    found = {}
    for name, op in ops.items():
        best = float("inf")
        for _ in range(15):
            started = time.thread_time()
            for _ in range(200):
                op()
            best = min(best, (time.thread_time() - started) / 200 * 1e6)
            a.sum().item()
        found[name] = round(best, 2)
    return found


# --- the run -------------------------------------------------------------------------------------------------------


def child(arguments: list[str], core: int, environment: dict[str, str]) -> dict[str, Any]:
    command = ["taskset", "-c", str(core), sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=900)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def under_lease(kind: str, only: list[str], delays: list[str], flags: list[str]) -> dict[str, Any]:
    """Run in `millpond pool run`: pin the worker, and measure without and with delays."""
    address = links.pin_worker()
    ours = ["--measure", "pool", "--device", kind, *flags]
    found = {"0": child([*ours, "--only", *only], CLIENT_CORE, dict(os.environ))}
    for delay in delays:
        with links.relay(address, float(delay)) as environment:
            found[delay] = child([*ours, "--only", *OVER_SLOWER], CLIENT_CORE, environment)
    return found


def through_pool(there: links.Network, kind: str, arguments: list[str]) -> dict[str, Any]:
    print(f"through a pool at {there.address}: {' '.join(arguments)}", file=sys.stderr, flush=True)
    with links.pool(there) as environment:
        command = [*there.client, *links.MILLPOND, "run", "--", sys.executable, __file__, "--under-lease"]
        command += ["--device", kind, *arguments]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=1800)
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def run(kind: str, quick: bool, wanted: list[str]) -> None:
    flags = ["--quick"] if quick else []
    result = report.about() | {"pinned": {"worker": WORKER_CORE, "client": CLIENT_CORE}}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_POOL_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    print("locally", file=sys.stderr, flush=True)
    result["local"] = child(["--measure", kind, "--device", kind, *flags], WORKER_CORE, environment)
    by_delay = through_pool(
        links.Network(), kind, [*flags, "--delays", *(delay for delay in DELAYS_MS if delay in wanted)]
    )
    pools = {f"+{delay} ms" if delay != "0" else "loopback": found for delay, found in by_delay.items()}
    not_measured = list(NOT_MEASURED)
    not_measured += [f"the link {link}, left out of this run" for link in (*DELAYS_MS, *RATES) if link not in wanted]
    if lacking := links.missing():
        not_measured.append(f"links of {' and '.join(RATES)}: this machine lacks {', '.join(lacking)}")
    else:
        for rate in RATES:
            if rate not in wanted:
                continue
            with links.network(rate) as there:
                pools[rate] = through_pool(there, kind, [*flags, "--only", *OVER_SLOWER])["0"]
    result |= {"pool_by_link": pools, "not_measured": not_measured, "load_average_at_end": os.getloadavg()}
    report.write(result, "device", page(result))


def page(result: dict[str, Any]) -> list[str]:
    """Return the result as lines of Markdown."""
    local, pools = result["local"], result["pool_by_link"]
    lines = [
        *report.heading(result, "The pool device"),
        f"Worker and client on a core each, the local run on the worker's; the best of {ROUNDS} rounds. Local and pool "
        "run one after the other: with other load on the machine their wall times do not compare, processor times do.",
        "",
        "| program | link | local ms | eager ms | captured ms | local/eager | local/captured | client CPU ms, eager | "
        "captured | worker CPU ms, eager | captured | local CPU ms | bytes out, eager | captured | bytes in, eager | "
        "captured |",
        "|" + "---|" * 16,
    ]
    for link, found in pools.items():
        for name, by in found["steps"].items():
            here, eager, captured = local["steps"][name]["eager"], by["eager"], by["captured"]
            base = here["ms"]
            cells = [name, link, base, eager["ms"], captured["ms"], f"{base / eager['ms']:.1%}"]
            cells += [f"{base / captured['ms']:.1%}", eager["client_cpu_ms"], captured["client_cpu_ms"]]
            cells += [eager["worker_cpu_ms"], captured["worker_cpu_ms"], here["client_cpu_ms"]]
            cells += [f"{how[field]:,}" for field in ("sent_bytes", "received_bytes") for how in (eager, captured)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| op, 8 x 8, no gradient | local µs | client µs | times |", "|---|---|---|---|"]
    for name, here in local["op_us"].items():
        there = pools["loopback"]["op_us"][name]
        lines.append(f"| {name} | {here} | {there} | {there / here:.1f} |")
    return [*lines, "", "Not yet measured:", "", *(f"- {what}" for what in result["not_measured"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer programs")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what the worker computes on, and so the programs' sizes",
    )
    links_help = "added round trips in ms, and rates, besides loopback; default: all"
    parser.add_argument(
        "--links", nargs="*", choices=[*DELAYS_MS, *RATES], default=[*DELAYS_MS, *RATES], help=links_help
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--delays", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--under-lease", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.device, options.only, options.quick)))
    elif options.under_lease:
        flags = ["--quick"] if options.quick else []
        print(json.dumps(under_lease(options.device, options.only, options.delays, flags)))
    else:
        with contextlib.suppress(KeyboardInterrupt):
            run(options.device, options.quick, options.links)


if __name__ == "__main__":
    main()
