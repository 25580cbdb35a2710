"""Links between a pool and its client on one machine: loopback, a relay that delays, a network of a given rate.

A network is two network namespaces joined by a veth pair, each end held to the rate by `tc tbf` (root is needed; the
names are this process's own and go with it). The kernel here need not have netem: delays are the relay's.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

WORKER_CORE, CLIENT_CORE = 0, min(1, (os.cpu_count() or 1) - 1)
MILLPOND = [sys.executable, "-m", "millpond", "pool"]
START_S = 60.0


# --- a network of a given rate -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """Where the pool and its client are: the prefix of a command that runs there, and the pool's address."""

    pool: list[str] = field(default_factory=list)
    client: list[str] = field(default_factory=list)
    address: str = "127.0.0.1"


def missing() -> list[str]:
    """Return what a network needs and this machine lacks."""
    lacking = [program for program in ("ip", "tc") if shutil.which(program) is None]
    return [*lacking, "root"] if os.geteuid() else lacking


@contextlib.contextmanager
def network(rate: str = "") -> Iterator[Network]:
    """Make a network with an address for the pool; `rate` as tc(8) has it, such as `10gbit`; empty: as it comes."""
    names = [f"bench-{os.getpid()}-{side}" for side in ("pool", "client")]
    devices = [f"v{os.getpid() % 100_000}{side}" for side in "pc"]
    try:
        for name in names:
            _do("ip", "netns", "add", name)
        pair = ["type", "veth", "peer", "name", devices[1], "netns", names[1]]
        _do("ip", "link", "add", devices[0], "netns", names[0], *pair)
        for number, (name, device) in enumerate(zip(names, devices, strict=True), 1):
            _do("ip", "-n", name, "address", "add", f"10.99.0.{number}/24", "dev", device)
            for each in ("lo", device):
                _do("ip", "-n", name, "link", "set", each, "up")
            if rate:
                limit = ["rate", rate, "burst", "256kb", "latency", "20ms"]
                _do("tc", "-n", name, "qdisc", "add", "dev", device, "root", "tbf", *limit)
        yield Network(*(["ip", "netns", "exec", name] for name in names), "10.99.0.1")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)


def _do(*command: str) -> None:
    subprocess.run(command, check=True, timeout=20)


# --- a pool on it --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pool(there: Network, *, memory: str = "4GiB", with_tls: bool = False) -> Iterator[dict[str, str]]:
    """Serve a pool on a network; yields the environment of its clients."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_POOL_")}
        environment |= {
            "MILLPOND_HOME": folder,
            "MILLPOND_POOL_TOKEN": secrets.token_hex(16),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        ours = _certificate(Path(folder), there.address) if with_tls else {}
        log = Path(folder) / "log"
        with log.open("wb") as file:
            command = [*there.pool, *MILLPOND, "serve", "--bind", there.address, "--port", "0", "--memory", memory]
            serving = subprocess.Popen(command, env=environment | ours, stdout=file, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + START_S
            while not (lines := [line for line in log.read_text().splitlines() if " listening on " in line]):
                if serving.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the pool did not start:\n{log.read_text()}")
                time.sleep(0.05)
            theirs = {"MILLPOND_POOL_TLS_CA": ours["MILLPOND_POOL_TLS_CERT"]} if with_tls else {}
            yield {**environment, **theirs, "MILLPOND_POOL_ADDRESS": lines[0].split()[-1]}
        finally:
            serving.terminate()
            serving.wait(20)


def _certificate(folder: Path, address: str) -> dict[str, str]:
    """Make a certificate that is its own authority."""
    cert, key = str(folder / "pool.crt"), str(folder / "pool.key")
    ask = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj", "/CN=pool"]
    made = ["openssl", "req", *ask, "-addext", f"subjectAltName=IP:{address}", "-keyout", key, "-out", cert]
    subprocess.run(made, check=True, timeout=20, stderr=subprocess.DEVNULL)
    return {"MILLPOND_POOL_TLS_CERT": cert, "MILLPOND_POOL_TLS_KEY": key}


def pin_worker() -> dict[str, object]:
    """Pin the worker of this process's lease to its core, and this process to the client's; return its address."""
    (worker,) = json.loads(os.environ["MILLPOND_POOL_WORKERS"])
    for task in Path(f"/proc/{worker['pid']}/task").iterdir():
        with contextlib.suppress(OSError):
            os.sched_setaffinity(int(task.name), {WORKER_CORE})  # threads that it starts from now on inherit it
    os.sched_setaffinity(0, {CLIENT_CORE})
    return worker  # type: ignore[no-any-return]


def bytes_moved(port: int) -> tuple[int, int]:
    """Return the bytes that this process has sent to a port and got acknowledged, and received: Linux's TCP_INFO."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as sock:
                if sock.getpeername()[1] == port:
                    return struct.unpack_from("=QQ", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), 120)
    return 0, 0


# --- a network that is further away --------------------------------------------------------------------------------


@contextlib.contextmanager
def relay(worker: dict[str, object], round_trip_ms: float) -> Iterator[dict[str, str]]:
    """Relay to a worker; yields the environment of a client that is so far away."""
    command = [sys.executable, __file__, str(worker["port"]), str(round_trip_ms)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as passing:
        assert passing.stdout is not None
        far = [{**worker, "port": int(passing.stdout.readline())}]
        try:
            yield {**os.environ, "MILLPOND_POOL_WORKERS": json.dumps(far)}
        finally:
            passing.kill()


def _relay(port: int, round_trip_ms: float) -> None:
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


if __name__ == "__main__":
    _relay(int(sys.argv[1]), float(sys.argv[2]))
