"""Programs that know only `cuda`, or the accelerator, run under `millpond pool run`, with the host's numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pool_site import BrokerProcess

PROGRAMS = Path(__file__).parent / "programs"
RUN = [sys.executable, "-m", "millpond", "pool", "run", "--", sys.executable]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    """A broker that lends this host's CPU."""
    broker = BrokerProcess(tmp_path_factory.mktemp("site"), MILLPOND_POOL_MEMORY=str(2**30))
    yield broker
    broker.close()


def run(command: list[str], environ: dict[str, str], timeout_s: float = 300) -> list[tuple[str, float]]:
    """Return the numbers that a program prints, each with its name."""
    environ = {**environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return [(name, float(number)) for name, number in lines]


def compare(site: BrokerProcess, program: str, *arguments: str, tolerance: float = 1e-4) -> None:
    """Run a program on the host and on the pool, and compare all that it prints."""
    command = [str(PROGRAMS / program), *arguments]
    local, pooled = run([sys.executable, *command], dict(os.environ)), run([*RUN, *command], site.environ)
    assert len(local) >= 10
    assert [name for name, _ in pooled] == [name for name, _ in local]
    assert [number for _, number in pooled] == pytest.approx(
        [number for _, number in local], abs=tolerance, rel=tolerance
    )


@pytest.mark.slow
def test_numbers_drawn_on_the_device_are_the_hosts(site):
    compare(site, "autoencode.py")


@pytest.mark.slow
def test_a_classifier_with_a_loading_process_and_pinned_memory(site):
    compare(site, "classify_digits.py")


@pytest.mark.slow
def test_a_transformer_with_tied_weights_that_resumes_from_its_checkpoint(site, tmp_path):
    compare(site, "train_gpt.py", str(tmp_path / "checkpoint.pt"))


@pytest.mark.slow
def test_the_same_in_mixed_precision(site, tmp_path):
    compare(site, "train_gpt.py", str(tmp_path / "checkpoint.pt"), "bfloat16", tolerance=0.02)


@pytest.mark.slow
def test_recurrent_networks_that_carry_their_state(site, tmp_path):
    compare(site, "model_words.py", str(tmp_path / "model.pt"))


@pytest.mark.slow
def test_double_precision_and_an_optimizer_with_a_closure(site):
    compare(site, "forecast.py")


@pytest.mark.slow
def test_hooks_checkpointing_function_transforms_threads_and_copies(site):
    compare(site, "everyday.py", tolerance=2e-3)
