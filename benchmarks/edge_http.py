"""Requests per second and latency of a real edge over HTTP, beside the same engine called directly, in one run.

The model has the shape of the default one (hashed uni-, bi- and trigrams, 2^20 rows); the texts are 230 words long, as
an average IMDB review is. Client and edge share the machine. Where other work goes on beside, processor time per text
(`cpu_ms_per_text`) tells more than rates. Writes benchmarks/results/edge_http.json.
"""

from __future__ import annotations

import datetime
import http.client
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper

from millpond.edge.engine import Engine
from millpond.edge.models import ModelShelf
from millpond.edge.state import EdgeFiles
from millpond.registry import ModelConfig
from millpond.text import TextConfig, TextEncoder

WORDS, VOCABULARY, TEXTS = 230, 50_000, 2_000
SECONDS = 6.0
RUNS = [
    ("one text, 1 client", 1, 1),
    ("one text, 8 clients", 1, 8),
    ("32 texts, 4 clients", 32, 4),
    ("256 texts, 2 clients", 256, 2),
]
DIGEST = "sha256:" + "0" * 64


def make_texts() -> list[str]:
    """Return texts whose words are as unevenly frequent as those of a language (Zipf)."""
    dice = np.random.default_rng(0)
    ranks = np.minimum(dice.zipf(1.3, (TEXTS, WORDS)), VOCABULARY)
    return [" ".join(f"w{rank}" for rank in row) for row in ranks]


def write_model(directory: Path, texts: list[str]) -> None:
    """Write a model directory of the default model's shape, with random weights."""
    directory.mkdir(parents=True)
    encoder = TextEncoder.learn(texts, TextConfig(features="ngrams"), min_count=1, max_vocabulary=VOCABULARY)
    (directory / "tokenizer.json").write_text(encoder.tokenizer_json)
    table = np.random.default_rng(1).normal(0, 0.05, (encoder.rows, 2)).astype(np.float32)
    table[0] = 0
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
            helper.make_node("ReduceSum", ["rows", "axes"], ["logits"], keepdims=0),
        ],
        "ngram",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.asarray([1]), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(directory / "model.onnx"))
    config = ModelConfig(
        name="sentiment", version="v1", labels=["negative", "positive"], architecture="ngram",
        text=msgspec.to_builtins(encoder.config),
    )  # fmt: skip
    (directory / "config.json").write_bytes(msgspec.json.encode(config))


def measure_engine(directory: Path, texts: list[str], batch: int) -> dict[str, float]:
    """Return rate and cost of the engine alone, in this process, on one thread."""
    engine = Engine(directory, DIGEST, threads=1)
    count, began, cpu_began = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < SECONDS / 2:
        start = count % (TEXTS - batch)
        engine.scores(texts[start : start + batch])
        count += batch
    return {
        "texts_per_s": round(count / (time.perf_counter() - began), 1),
        "cpu_ms_per_text": round((time.process_time() - cpu_began) / count * 1000, 3),
    }


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and its children so far."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def measure_http(url: str, texts: list[str], batch: int, clients: int, pid: int) -> dict[str, Any]:
    """Return rate and latency of requests with `batch` texts each."""
    bodies = [json.dumps({"texts": texts[i : i + batch]} if batch > 1 else {"text": texts[i]}).encode()
              for i in range(0, TEXTS - batch + 1, batch)]  # fmt: skip
    seconds: list[float] = []
    failed: list[int] = []
    until = time.perf_counter() + SECONDS

    def ask(client: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        dice = random.Random(client)
        while time.perf_counter() < until:
            began = time.perf_counter()
            connection.request("POST", "/v1/predict", dice.choice(bodies), {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            seconds.append(time.perf_counter() - began)
            if response.status != 200:
                failed.append(response.status)
        connection.close()

    began, cpu_began = time.perf_counter(), cpu_seconds(pid)
    threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = len(seconds) / (time.perf_counter() - began)
    cpu_s = cpu_seconds(pid) - cpu_began
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return {
        "requests_per_s": round(rate, 1),
        "texts_per_s": round(rate * batch, 1),
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
        "cpu_ms_per_text": round(cpu_s / (len(seconds) * batch) * 1000, 3),
        "failed": len(failed),
    }


def main() -> None:
    """Run it, print it, keep it."""
    texts = make_texts()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        shelf = ModelShelf(EdgeFiles(home).models)
        write_model(shelf.path(DIGEST), texts)
        shelf.activate(DIGEST, keep=1)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
        environ |= {"MILLPOND_HOME": str(home), "MILLPOND_EDGE_PORT": "0"}
        edge = subprocess.Popen(
            [sys.executable, "-m", "millpond", "edge", "serve"], env=environ, stdout=subprocess.PIPE, text=True
        )
        try:
            assert edge.stdout is not None
            found = re.search(r"http://\S+", edge.stdout.readline())
            assert found is not None, "the edge did not start"
            measure_http(found[0], texts, 1, 8, edge.pid)  # both workers warm
            http_runs = {name: measure_http(found[0], texts, batch, clients, edge.pid) for name, batch, clients in RUNS}
        finally:
            edge.terminate()
            edge.wait(30)
        engine = {f"{batch} at a time": measure_engine(shelf.path(DIGEST), texts, batch) for batch in (1, 256)}
    result = {
        "command": "python benchmarks/edge_http.py",
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "load_1min": round(os.getloadavg()[0], 2)},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("millpond", "gunicorn", "flask", "onnxruntime", "tokenizers")},
        "http, 2 workers": http_runs,
        "engine alone, 1 thread": engine,
    }
    text = json.dumps(result, indent=2)
    print(text)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "edge_http.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
