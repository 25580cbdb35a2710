"""Public programs, unchanged, on the pool device and on the host, from checkouts that a person gives.

    python tests/pool/public_programs.py DIRECTORY [--only REGEX]

DIRECTORY holds `nanoGPT` (github.com/karpathy/nanoGPT) and `examples` (github.com/pytorch/examples). Each program runs
twice from a copy, on made-up data of its form, and the losses that it prints must agree. What a program needs besides
torch (torchvision for CPU, matplotlib, …) must be installed. No test: nothing of theirs is in this repository.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from pool_site import BrokerProcess

LIMIT_S = 900
"""How long one run may take."""
TOLERANCE = 2e-4
"""1e-4, and what printing four decimals takes off each of the two numbers."""
NUMBER = re.compile(r"(?i)\b(?:loss(?:_[a-z]+)?|ppl|nll|error)\b[^0-9\n(|]{0,12}(-?\d+\.\d+(?:e[-+]?\d+)?|nan)")
REFERENCE = Path(__file__).parent / "as_if_accelerated.py"
"""Runs a program on the host as if that had an accelerator."""


@dataclass(frozen=True)
class Program:
    """A program of a checkout, and how it is started."""

    name: str
    folder: str
    command: str
    """The script and its arguments, on either side."""
    device: str = ""
    """Further arguments on the device; and on the host:"""
    host: str = ""
    draws: str = "bernoulli_"
    """The ops by which it draws on the device."""
    prepare: Callable[[Path], None] = lambda folder: None
    """Makes its data."""


def text(folder: Path) -> None:
    """Write a text, and have nanoGPT's own script make ids of it."""
    made = folder / "data/shakespeare_char"
    words = np.random.default_rng(1).choice(["to", "be", "or", "not", "that", "is", "the", "question,", "\n"], 40_000)
    (made / "input.txt").write_text(" ".join(words))
    subprocess.run([sys.executable, "prepare.py"], cwd=made, check=True, capture_output=True)


def digits(folder: Path) -> None:
    """Write images in MNIST's format: each a bright square whose place says which digit it is."""
    random, raw = np.random.default_rng(1), folder.parent / "data/MNIST/raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 64 * 24), ("t10k", 200)):
        labels = random.integers(0, 10, count).astype(np.uint8)
        images = random.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 * (label // 4) : 4 * (label // 4) + 8, 5 * (label % 4) : 5 * (label % 4) + 8] = 250
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())


def words(folder: Path) -> None:
    """Write a small corpus where the wikitext is."""
    corpus = folder / "data/wikitext-2"
    shutil.rmtree(corpus, ignore_errors=True)
    corpus.mkdir(parents=True)
    random = np.random.default_rng(1)
    for name, lines in (("train", 400), ("valid", 20), ("test", 20)):
        rows = (" ".join(f"w{w}" for w in random.integers(0, 60, 20)) for _ in range(lines))
        (corpus / f"{name}.txt").write_text("\n".join(rows) + "\n")


def photographs(folder: Path) -> None:
    """Write pictures where the super-resolution program would download them."""
    from PIL import Image

    random = np.random.default_rng(1)
    for name, count in (("train", 44), ("test", 4)):
        made = folder / "dataset/BSDS300/images" / name
        made.mkdir(parents=True)
        for number in range(count):
            small = random.integers(0, 255, (12, 12, 3)).astype(np.uint8)
            Image.fromarray(small).resize((300, 300)).save(made / f"{number}.jpg")


def citations(folder: Path) -> None:
    """Write a graph in the format of Cora."""
    random = np.random.default_rng(1)
    (folder / "cora").mkdir()
    kinds = random.integers(0, 5, 1700)
    features = random.random((1700, 60)) < 0.05 + 0.3 * (np.arange(60) % 5 == kinds[:, None])
    rows = (
        f"{n} {' '.join(str(int(f)) for f in row)} kind{kind}"
        for n, (row, kind) in enumerate(zip(features, kinds, strict=True))
    )
    (folder / "cora/cora.content").write_text("\n".join(rows) + "\n")
    edges = random.integers(0, 1700, (4000, 2))
    (folder / "cora/cora.cites").write_text("\n".join(f"{a} {b}" for a, b in edges) + "\n")


_GPT = (
    "train.py config/train_shakespeare_char.py --eval_interval=20 --eval_iters=2 --log_interval=1 --block_size=64 "
    "--batch_size=4 --n_layer=2 --n_head=2 --n_embd=64 --max_iters=22 --lr_decay_iters=25 --warmup_iters=2 "
    "--dropout=0.2 --compile=False --dtype=float32"
)
_DIGITS = "main.py --epochs 1 --log-interval 1 --batch-size 64 --test-batch-size 100"
_WORDS = "main.py --epochs 1 --log-interval 5 --emsize 32 --nhid 32 --lr 1 --bptt 15 --model"
PROGRAMS = [
    Program(
        "nanoGPT",
        "nanoGPT",
        _GPT,
        "--device=cuda",
        "--device=cpu",
        "bernoulli_ _scaled_dot_product_flash_attention_for_cpu",
        prepare=text,
    ),
    Program("mnist", "examples/mnist", _DIGITS, prepare=digits),
    Program("mnist_rnn", "examples/mnist_rnn", f"{_DIGITS} --accel", prepare=digits),
    Program(
        "vae",
        "examples/vae",
        "main.py --epochs 2 --log-interval 1",
        draws="randn_like",
        prepare=digits,
    ),
    Program("siamese_network", "examples/siamese_network", _DIGITS, prepare=digits),
    *(
        Program(
            f"word_language_model {kind}", "examples/word_language_model", f"{_WORDS} {kind} --accel", prepare=words
        )
        for kind in ("LSTM", "GRU", "RNN_TANH", "Transformer")
    ),
    Program(
        "super_resolution",
        "examples/super_resolution",
        "main.py --upscale_factor 4 --batchSize 2 --testBatchSize 2 --nEpochs 1 --threads 1 --seed 3 --accel",
        prepare=photographs,
    ),
    Program(
        "dcgan",
        "examples/dcgan",
        "main.py --dataset fake --ngf 8 --ndf 8 --niter 2 --manualSeed 1 --workers 1 --accel",
        draws="randn normal_",
    ),
    Program(
        "gat",
        "examples/gat",
        "main.py --epochs 22 --val-every 1 --hidden-dim 16",
        draws="bernoulli_",
        prepare=citations,
    ),
]


def losses(site: BrokerProcess | None, program: Program, checkouts: Path, directory: Path) -> list[float]:
    """Run a program from a copy, on the device of a site or on the host; return the losses that it prints."""
    folder = directory / ("device" if site else "host") / program.folder
    shutil.copytree(checkouts / program.folder, folder)
    program.prepare(folder)
    arguments = [*program.command.split(), *(program.device if site else program.host).split()]
    environ = {**(site.environ if site else os.environ), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    if site:
        command = [sys.executable, "-m", "millpond", "pool", "run", "--", sys.executable, *arguments]
    else:
        command = [sys.executable, str(REFERENCE), program.draws, *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode:
        print(f"{program.name}: {' '.join(command)} ended with {done.returncode}\n{done.stderr[-3000:]}")
        return []
    return [float(number) for number in NUMBER.findall(done.stdout + done.stderr)]


def main() -> None:
    """Compare all programs, and print a line for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkouts", type=Path)
    parser.add_argument("--only", default="", help="a regular expression for names")
    options = parser.parse_args()
    worst: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        site = BrokerProcess(Path(temporary) / "site", MILLPOND_POOL_MEMORY=str(2**32), OMP_NUM_THREADS="1")
        try:
            for number, program in enumerate(p for p in PROGRAMS if re.search(options.only, p.name)):
                directory, started = Path(temporary) / str(number), time.monotonic()
                local, pooled = (losses(where, program, options.checkouts, directory) for where in (None, site))
                if len(local) < 2 or len(local) != len(pooled):
                    print(f"{program.name}: {len(local)} losses on the host, {len(pooled)} on the device")
                    worst[program.name] = float("nan")
                    continue
                worst[program.name] = max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(local, pooled, strict=True))
                print(
                    f"{program.name:32} {len(local):4} losses, {local[0]:.4f} to {local[-1]:.4f}, "
                    f"largest difference {worst[program.name]:.1e}, {time.monotonic() - started:.0f} s",
                    flush=True,
                )
        finally:
            site.close()
    if bad := [name for name, difference in worst.items() if not difference <= TOLERANCE]:
        raise SystemExit(f"These differ by more than {TOLERANCE}: {', '.join(bad)}")


if __name__ == "__main__":
    main()
