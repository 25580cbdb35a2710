"""The same programs on a worker's device locally and through the pool, eager and captured, in one run, as ratios.

Worker and client are pinned to a processor core each, the local run has the worker's. A time is the best of several
rounds, as other work may go on beside. Prints a table and writes benchmarks/results/<date>-device.json and .md:

    python benchmarks/bench_device.py [--quick]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
DELAYS_MS = (0.05, 1.0, 10.0)
WORKER_CORE, CLIENT_CORE = 0, min(1, (os.cpu_count() or 1) - 1)
MEMORY = "4GiB"
NOT_MEASURED = [
    "everything on a GPU: local against pool, eager and captured, CUDA graphs, ResNet-50-like convolutions",
    "the targets of 99 % (eager, steps of 20 ms or more), 100 % and 95 % (captured) on GPU kernels",
    "links of 10 Gbit/s and 1 Gbit/s, RoCE, TLS, SkyTorch and mycelya-torch beside it",
]


# --- programs: each is given a device and how to make a step of it -------------------------------------------------


def programs(torch: Any, quick: bool) -> dict[str, Callable[[str, bool], Callable[[], Any]]]:
    """Name → a function of (device, captured) that returns one step, which may return before it is done."""
    from torch import nn
    from torch.nn import functional

    class SeqCnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20_000, 256)
            self.convolutions = nn.ModuleList(nn.Conv1d(256, 256, width) for width in (3, 4))
            self.dropout, self.output = nn.Dropout(0.5), nn.Linear(512, 2)

        def forward(self, ids: Any) -> Any:
            x = self.embedding(ids).transpose(1, 2)
            pooled = [functional.elu(convolution(x).amax(2)) for convolution in self.convolutions]
            return self.output(self.dropout(torch.cat(pooled, 1)))

    class MiniLm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(30_522, 384)
            layer = nn.TransformerEncoderLayer(384, 12, 1536, activation="gelu", batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
            self.output = nn.Linear(384, 2)

        def forward(self, ids: Any) -> Any:
            return self.output(self.layers(self.embedding(ids)).mean(1))

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(10)]
            self.embedding, self.layers = nn.Embedding(1000, 32), nn.Sequential(*layers, nn.Linear(32, 2))

        def forward(self, ids: Any) -> Any:
            return self.layers(self.embedding(ids).mean(1))

    def training(model_class: Any, batch: int, length: int) -> Callable[[str, bool], Callable[[], Any]]:
        def make(device: str, captured: bool) -> Callable[[], Any]:
            torch.manual_seed(1)
            model = model_class().to(device)
            optimizer = torch.optim.Adam(model.parameters(), foreach=True)
            ids, labels = torch.randint(1, 1000, (batch, length)), torch.randint(0, 2, (batch,))

            def step(ids: Any, labels: Any) -> Any:
                loss = functional.cross_entropy(model(ids), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                return loss.detach()

            run = torch.compile(step) if captured else step
            return lambda: run(ids.to(device), labels.to(device))

        return make

    def inference(model_class: Any, batch: int, length: int) -> Callable[[str, bool], Callable[[], Any]]:
        def make(device: str, captured: bool) -> Callable[[], Any]:
            torch.manual_seed(1)
            model = model_class().eval().to(device)
            answer = torch.compile(model) if captured else model
            ids = torch.randint(1, 1000, (batch, length))

            def step() -> Any:
                with torch.no_grad():
                    return answer(ids.to(device)).cpu()  # an answer is read: one round trip each

            return step

        return make

    table = {
        "small, training, batch 16": training(Small, 16, 8),
        "seqcnn 256, training, batch 16": training(SeqCnn, 16, 100),
        "minilm, inference, batch 1": inference(MiniLm, 1, 64),
    }
    return table if quick else table | {"minilm, training, batch 4": training(MiniLm, 4, 32)}


# --- the measured process ------------------------------------------------------------------------------------------


def measure(device: str, quick: bool, names: list[str]) -> dict[str, Any]:
    """Measure on one device, in this process; through the pool also captured."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {"steps": {}}
    wait = torch.ones(1, device=device)
    for name, make in programs(torch, quick).items():
        if names and name not in names:
            continue
        for how in ("eager", "captured") if device == "pool" else ("eager",):
            step = make(device, how == "captured")
            for _ in range(3):
                step()
            wait.cpu()
            found["steps"].setdefault(name, {})[how] = best_step(step, wait.cpu)
    if not names:
        found["op_us"] = op_times(torch, device)
        found["transfer"] = transfer(torch, device, quick) if device == "pool" else raw_loopback(quick)
    return found


def best_step(step: Callable[[], Any], wait: Callable[[], Any], rounds: int = 5) -> dict[str, float]:
    """Return the best of several rounds: milliseconds of a step, and of processor in it, here and at the worker."""
    started = time.perf_counter()
    step()
    wait()
    count = max(1, int(0.5 / (time.perf_counter() - started)))
    wall, processor, worker = [], [], []
    for _ in range(rounds):
        before, cpu, there = time.perf_counter(), time.process_time(), worker_processor_s()
        for _ in range(count):
            step()
        wait()
        wall.append((time.perf_counter() - before) / count * 1e3)
        processor.append((time.process_time() - cpu) / count * 1e3)
        worker.append((worker_processor_s() - there) / count * 1e3)
    times = {"ms": wall, "client_cpu_ms": processor, "worker_cpu_ms": worker}
    return {name: round(min(values), 3) for name, values in times.items()}


def worker_processor_s() -> float:
    """Return what the worker has used of its processor: unlike time, it does not tell what goes on beside."""
    workers = json.loads(os.environ.get("MILLPOND_POOL_WORKERS", "[]"))
    return sum(sum(psutil.Process(worker["pid"]).cpu_times()[:2]) for worker in workers)


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


def transfer(torch: Any, device: str, quick: bool) -> dict[str, float]:
    """Return GB/s of a large upload and download."""
    size = 2**27 if quick else 2**30
    host = torch.ones(size, dtype=torch.uint8)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    rates: dict[str, float] = {}
    for _ in range(3):
        for name, move in (("upload", lambda: (there.copy_(host), there[:1].cpu())), ("download", there.cpu)):
            started = time.perf_counter()
            move()
            rates[name] = max(rates.get(name, 0.0), round(size / (time.perf_counter() - started) / 1e9, 3))
    return rates


def raw_loopback(quick: bool) -> dict[str, float]:
    """Return GB/s of a bare socket over loopback, sender and receiver on the same two cores."""
    size, piece = 2**27 if quick else 2**30, bytes(2**20)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = os.fork()
        if child == 0:
            os.sched_setaffinity(0, {CLIENT_CORE})
            with socket.create_connection(listener.getsockname()) as sender:
                for _ in range(size // len(piece)):
                    sender.sendall(piece)
                sender.recv(1)
            os._exit(0)
        with listener.accept()[0] as receiver:
            target, done, started = bytearray(2**22), 0, time.perf_counter()
            while done < size:
                done += receiver.recv_into(target)
            seconds = time.perf_counter() - started
            receiver.sendall(b"x")
        os.waitpid(child, 0)
    return {"loopback": round(size / seconds / 1e9, 3)}


# --- a network that is further away --------------------------------------------------------------------------------


def relay(port: int, round_trip_ms: float) -> None:
    """Pass on what comes, half a round trip later each way; print the port first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            near, _ = listener.accept()
            far = socket.create_connection(("127.0.0.1", port))
            for one, other in ((near, far), (far, near)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                under_way: queue.Queue[tuple[float, bytes]] = queue.Queue(10_000)
                threading.Thread(target=_take, args=(one, under_way, round_trip_ms / 2000), daemon=True).start()
                threading.Thread(target=_deliver, args=(other, under_way), daemon=True).start()


def _take(source: socket.socket, under_way: queue.Queue[tuple[float, bytes]], delay_s: float) -> None:
    while data := source.recv(2**18):
        under_way.put((time.perf_counter() + delay_s, data))
    under_way.put((0.0, b""))


def _deliver(target: socket.socket, under_way: queue.Queue[tuple[float, bytes]]) -> None:
    while True:
        due, data = under_way.get()
        if not data:
            target.close()
            return
        time.sleep(max(0.0, due - time.perf_counter()))
        target.sendall(data)


# --- the run -------------------------------------------------------------------------------------------------------


def child(arguments: list[str], core: int, environment: dict[str, str]) -> dict[str, Any]:
    command = ["taskset", "-c", str(core), sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=900)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def under_lease(quick: bool) -> dict[str, Any]:
    """Run in `millpond pool run`: pin the worker, and measure without and with delays."""
    (worker,) = json.loads(os.environ["MILLPOND_POOL_WORKERS"])
    os.sched_setaffinity(worker["pid"], {WORKER_CORE})  # threads that it starts from now on inherit it
    flags = ["--quick"] if quick else []
    found = {"0": child(["--measure", "pool", *flags], CLIENT_CORE, dict(os.environ))}
    for delay in DELAYS_MS:
        command = ["taskset", "-c", str(CLIENT_CORE), sys.executable, __file__, "--relay", str(worker["port"])]
        with subprocess.Popen([*command, str(delay)], stdout=subprocess.PIPE, text=True) as passing:
            assert passing.stdout is not None
            far = [{**worker, "port": int(passing.stdout.readline())}]
            environment = {**os.environ, "MILLPOND_POOL_WORKERS": json.dumps(far)}
            only = ["--only", "small, training, batch 16", "minilm, inference, batch 1"]
            found[str(delay)] = child(["--measure", "pool", *flags, *only], CLIENT_CORE, environment)
            passing.kill()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer programs, smaller transfers")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--relay", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--under-lease", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.relay:
        relay(int(options.relay[0]), float(options.relay[1]))
    elif options.measure:
        print(json.dumps(measure(options.measure, options.quick, options.only)))
    elif options.under_lease:
        print(json.dumps(under_lease(options.quick)))
    else:
        run(options.quick)


def run(quick: bool) -> None:
    flags = ["--quick"] if quick else []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_POOL_")}
    home = tempfile.TemporaryDirectory()
    environment |= {
        "MILLPOND_HOME": home.name,
        "MILLPOND_POOL_ADDRESS": f"127.0.0.1:{port}",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    millpond = [sys.executable, "-m", "millpond", "pool"]
    load = os.getloadavg()
    local = child(["--measure", "cpu", *flags], WORKER_CORE, environment)
    serving = subprocess.Popen([*millpond, "serve", "--port", str(port), "--memory", MEMORY], env=environment)
    try:
        while True:  # until it listens
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        command = [*millpond, "run", "--", sys.executable, __file__, "--under-lease", *flags]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=1800)
        pool = json.loads(done.stdout.splitlines()[-1])
    finally:
        serving.terminate()
        serving.wait(20)
        home.cleanup()
    now = datetime.datetime.now(datetime.UTC)
    result = {
        "command": "python benchmarks/bench_device.py" + (" --quick" if quick else ""),
        "at": f"{now:%Y-%m-%dT%H:%M:%SZ}",
        "versions": {name: version(name) for name in ("millpond", "torch", "msgspec", "numpy")},
        "machine": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "load_average_at_start": load,
        },
        "pinned": {"worker": WORKER_CORE, "client": CLIENT_CORE},
        "local": local,
        "pool_by_added_round_trip_ms": pool,
        "not_measured": NOT_MEASURED,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y-%m-%d}-device.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    text = table(result)
    path.with_suffix(".md").write_text(text)
    print(text)


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    local, pools = result["local"], result["pool_by_added_round_trip_ms"]
    lines = [
        f"# The pool device, {result['at'][:10]}",
        "",
        f"`{result['command']}`; {', '.join(f'{k} {v}' for k, v in result['versions'].items())}; Python "
        f"{result['machine']['python']}, {result['machine']['cores']} cores, one for the worker, one for the client; "
        f"load at the start {result['machine']['load_average_at_start'][0]:.1f}. Best of five rounds.",
        "",
        "Local and pool run one after the other: with other load on the machine their wall times do not compare, "
        "processor times do.",
        "",
        "| program | added round trip | local ms | eager ms | captured ms | local/eager | local/captured | "
        "client CPU ms, eager | captured | worker CPU ms, eager | captured | local CPU ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for delay, found in pools.items():
        for name, by in found["steps"].items():
            here, eager, captured = local["steps"][name]["eager"], by["eager"], by["captured"]
            base = here["ms"]
            lines.append(
                f"| {name} | {delay} ms | {base} | {eager['ms']} | {captured['ms']} | {base / eager['ms']:.1%} | "
                f"{base / captured['ms']:.1%} | {eager['client_cpu_ms']} | {captured['client_cpu_ms']} | "
                f"{eager['worker_cpu_ms']} | {captured['worker_cpu_ms']} | {here['client_cpu_ms']} |"
            )
    lines += ["", "| op, 8 x 8, no gradient | local µs | client µs | times |", "|---|---|---|---|"]
    for name, here in local["op_us"].items():
        there = pools["0"]["op_us"][name]
        lines.append(f"| {name} | {here} | {there} | {there / here:.1f} |")
    raw = local["transfer"]["loopback"]
    lines += ["", "| large tensor | GB/s | of a bare socket |", "|---|---|---|"]
    lines += [f"| {name} | {rate} | {rate / raw:.0%} |" for name, rate in pools["0"]["transfer"].items()]
    lines += [f"| bare socket over loopback | {raw} | |", "", "Not yet measured:", ""]
    return "\n".join([*lines, *(f"- {what}" for what in result["not_measured"])]) + "\n"


if __name__ == "__main__":
    main()
