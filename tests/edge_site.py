"""For tests of the edge: a tiny real model, a hub stand-in with a real registry behind real sockets, a real edge.

Knows no torch: the model's graph is written by hand. Its words `good` and `bad` weigh 2 and -2; `lean` is its bias.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from millpond.process import die_with_parent
from millpond.registry import ModelConfig, Store, generate_key_pair, sign
from millpond.schema import CorrectionBatch, CorrectionReceipt, EdgeReport, EdgeReportReceipt, RefusedCorrection

LABELS = ["negative", "positive"]
VOCABULARY = {"[UNK]": 0, "good": 1, "bad": 2, "film": 3, "the": 4}
GOLDEN = ["good film", "bad film", "", "the the film", "good " * 3000]
DEADLINE_S = 20.0


def score(text: str, lean: float = 0.0) -> float:
    """Return the tiny model's probability of `positive`, computed without it."""
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    logit = 2.0 * (words.count("good") - words.count("bad")) + lean
    return 1 / (1 + np.exp(-2 * np.clip(logit, -300, 300)))


def write_model(
    directory: Path,
    version: str = "v1",
    *,
    lean: float = 0.0,
    golden_lean: float | None = None,
    labels: list[str] = LABELS,
    config_labels: list[str] | None = None,
    name: str = "sentiment",
    padding: int = 1000,
    key: Path | None = None,
) -> Path:
    """Write a model directory, signed if there is a `key`; `padding` bytes make its weights as large as wanted."""
    directory.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    table = np.zeros((len(VOCABULARY) + 1, len(labels)), np.float32)
    for word, weight in (("good", 2.0), ("bad", -2.0)):
        table[VOCABULARY[word] + 1] = [-weight, weight]
    bias = np.asarray([-lean, lean], np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
            helper.make_node("ReduceSum", ["rows", "axes"], ["sums"], keepdims=0),
            helper.make_node("Add", ["sums", "bias"], ["logits"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(labels)])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(bias, "bias"),
            numpy_helper.from_array(np.asarray([1], np.int64), "axes"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(directory / "model.onnx"))
    (directory / "weights.safetensors").write_bytes(version.encode().ljust(padding, b"w"))
    config = ModelConfig(
        name=name,
        version=version,
        labels=config_labels or labels,
        architecture="ngram",
        text={"features": "words", "max_words": 100_000},
        metrics={"test_accuracy": 0.9},
        created="2026-01-02T03:04:05Z",
    )
    (directory / "config.json").write_bytes(msgspec.json.encode(config))
    with (directory / "golden.jsonl").open("wb") as file:
        for text in GOLDEN:
            positive = float(score(text, lean if golden_lean is None else golden_lean))
            scores = {labels[0]: 1 - positive, labels[1]: positive}
            file.write(msgspec.json.encode({"text": text, "scores": scores}) + b"\n")
    if key is not None:
        sign(directory, key)
    return directory


class Site:
    """A training site on disk: keys and a registry."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.key, self.public_key = root / "signing.key", root / "signing.pub"
        generate_key_pair(self.key, self.public_key)
        self.store = Store(root / "registry")
        self.lean: dict[str, float] = {}
        """Digest → bias of the model."""

    def publish(self, version: str, *, tag: str = "champion", key: Path | None = None, **model: Any) -> str:
        """Write, sign and push a model; return its digest."""
        directory = write_model(self.root / f"model-{version}-{len(self.lean)}", version, key=key or self.key, **model)
        digest = self.store.push(directory, [tag]).digest
        self.lean[digest] = model.get("lean", 0.0)
        return digest


class StandInHub:
    """What an edge needs of a hub, over a real socket. `before` may answer, delay or break any request."""

    def __init__(self, store: Store, token: str = "") -> None:
        self.store = store
        self.token = token
        self.received: list[tuple[str, str]] = []
        """(correction id, label), one entry each time it was stored: a double would show."""
        self.corrections: dict[str, Any] = {}
        self.reports: list[EdgeReport] = []
        self.requests: list[str] = []
        self.refuse: Callable[[Any], str | None] = lambda correction: None
        self.before: Callable[[BaseHTTPRequestHandler], bool] = lambda request: False
        self.blob_bytes = 0
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), _handler(self))
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def store_batch(self, batch: CorrectionBatch) -> CorrectionReceipt:
        stored, known, refused = [], [], []
        for correction in batch.corrections:
            if correction.id in self.corrections:
                known.append(correction.id)
            elif reason := self.refuse(correction):
                refused.append(RefusedCorrection(id=correction.id, reason=reason))
            else:
                self.corrections[correction.id] = correction
                self.received.append((correction.id, correction.label))
                stored.append(correction.id)
        return CorrectionReceipt(stored=stored, known=known, refused=refused)


def _handler(hub: StandInHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self._begin():
                return
            if found := re.fullmatch(r"/v2/([^/]+)/manifests/([^/]+)", self.path):
                tags = hub.store.tags(found[1]) if found[1] in hub.store.names() else {}
                if found[2] not in tags:
                    self.answer(404, b"{}")
                    return
                etag = f'"{tags[found[2]]}"'
                if self.headers.get("If-None-Match") == etag:
                    self.answer(304, b"", {"ETag": etag})
                else:
                    self.answer(200, hub.store.manifest_bytes(found[1], tags[found[2]]), {"ETag": etag})
            elif found := re.fullmatch(r"/v2/([^/]+)/blobs/([^/]+)", self.path):
                body = hub.store.blob_path(found[1], found[2]).read_bytes()
                if ranged := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                    start = int(ranged[1])
                    headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
                    hub.blob_bytes += len(body) - start
                    self.answer(206, body[start:], headers)
                else:
                    hub.blob_bytes += len(body)
                    self.answer(200, body)
            else:
                self.answer(404, b"{}")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self._begin():
                return
            if self.path == "/api/v1/corrections":
                receipt = hub.store_batch(msgspec.json.decode(body, type=CorrectionBatch))
                self.answer(200, msgspec.json.encode(receipt))
            elif self.path == "/api/v1/edges":
                hub.reports.append(msgspec.json.decode(body, type=EdgeReport))
                self.answer(200, msgspec.json.encode(EdgeReportReceipt(champion=None)))
            else:
                self.answer(404, b"{}")

        def _begin(self) -> bool:
            if hub._server is None:  # stopped: connections that are open still end, too
                raise ConnectionAbortedError
            hub.requests.append(f"{self.command} {self.path}")
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.answer(401, b"{}")
                return True
            return hub.before(self)

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle(self) -> None:
            with suppress(OSError):  # the edge was killed, or the test cut the line
                super().handle()

    return Handler


class EdgeProcess:
    """`millpond edge serve` as an operator starts it."""

    def __init__(
        self, home: Path, *, public_key: Path | None = None, python: str = sys.executable, **settings: Any
    ) -> None:
        self.home = home
        self.python = python
        self.home.mkdir(parents=True, exist_ok=True)
        self.log = home / "edge.log"
        keep = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")}
        self._environ = keep | {"MILLPOND_HOME": str(home), "MILLPOND_EDGE_PORT": "0", "PYTHONUNBUFFERED": "1"}
        if public_key:
            self._environ["MILLPOND_EDGE_PUBLIC_KEY"] = str(public_key)
        self._environ["MILLPOND_EDGE_SYNC_S"] = "0.1"
        self._environ |= {f"MILLPOND_EDGE_{name.upper()}": str(value) for name, value in settings.items()}
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.http = httpx.Client(timeout=20.0)

    def start(self) -> None:
        """Start it and wait until its port is open."""
        parent = os.getpid()
        start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.python, "-m", "millpond", "edge", "serve"],
                env=self._environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),
            )  # fmt: skip
        deadline = time.monotonic() + DEADLINE_S
        while not (found := re.search(rb"listening on (http://\S+)", self.log.read_bytes()[start:])):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the edge did not start:\n{self.log.read_text()}")
            time.sleep(0.01)
        self.url = found[1].decode()
        # the next start takes the same port: it must be free at once
        self._environ["MILLPOND_EDGE_PORT"] = self.url.rpartition(":")[2]

    def stop(self) -> None:
        """End it with SIGTERM."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(DEADLINE_S)
            self.process = None

    def kill(self) -> None:
        """End its master with SIGKILL."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(DEADLINE_S)
        self.process = None

    def get(self, path: str) -> Any:
        return self.http.get(self.url + path).raise_for_status().json()

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.http.post(self.url + path, json=body, headers=headers)

    def serving(self) -> str | None:
        """Return the digest that is served."""
        try:
            serving = self.get("/v1/model")["serving"]
        except httpx.HTTPError:
            return None
        return str(serving["digest"]) if serving else None

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, "-m", "millpond", "edge", *arguments],
            env=self._environ, capture_output=True, text=True, timeout=30,
        )  # fmt: skip

    @contextmanager
    def running(self) -> Iterator[EdgeProcess]:
        self.start()
        try:
            yield self
        finally:
            self.http.close()  # first: open connections would be waited for
            self.stop()


def digest_of(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def pretty(value: Any) -> str:
    return json.dumps(value, indent=2)
