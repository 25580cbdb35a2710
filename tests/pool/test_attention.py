"""Attention by the kernel that the worker's GPU would choose: here a CPU stands in for it (stand_in_gpu.py)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pool.conftest import DeviceProcess
from pool.stand_in_gpu import NAME
from worker_site import WorkerProcess

COMMAND = [sys.executable, str(Path(__file__).with_name("stand_in_gpu.py"))]


@pytest.fixture(scope="module")
def gpu_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A worker that says it is a GPU."""
    log = tmp_path_factory.mktemp("worker") / "worker.log"
    with contextlib.closing(WorkerProcess(log=log, command=COMMAND, device=NAME)) as worker:
        yield worker


@pytest.fixture(scope="module")
def gpu(gpu_worker: WorkerProcess) -> Iterator[DeviceProcess]:
    """A process whose device it is."""
    with contextlib.closing(DeviceProcess(gpu_worker)) as process:
        yield process


def test_the_worker_chooses_and_its_kernel_attends_and_learns(gpu: DeviceProcess) -> None:
    def attends_as_on_the_host():
        import millpond.pool.kernels as kernels

        names = []
        issued = kernels.Session.issue

        def noting(session, item, what):
            names.append(str(what).partition("(")[0].removeprefix("aten::_scaled_dot_product_"))
            return issued(session, item, what)

        kernels.Session.issue = noting
        torch.manual_seed(1)
        cases = [
            (torch.float32, "efficient_attention", None, False, 16),
            (torch.float32, "efficient_attention", "bool", False, 16),
            (torch.float32, "efficient_attention", "float", False, 16),
            (torch.float32, "efficient_attention", None, True, 12),
            (torch.bfloat16, "flash_attention", None, True, 16),
            (torch.bfloat16, "flash_attention", None, False, 12),
            (torch.bfloat16, "efficient_attention", "float", False, 16),
            (torch.float64, "attention_math", None, False, 16),
        ]
        for dtype, kernel, masked, causal, size in cases:
            host = [torch.randn(2, 3, rows, size, dtype=dtype, requires_grad=True) for rows in (5, 7, 7)]
            there = [x.detach().to("pool").requires_grad_() for x in host]
            mask = None
            if masked:
                mask = torch.randn(2, 1, 5, 7, dtype=dtype)
                mask = mask > -1 if masked == "bool" else mask
            results = []
            for _ in range(2):  # the second time, nothing is asked
                names.clear()
                results = []
                for operands, bias in ((host, mask), (there, None if mask is None else mask.to("pool"))):
                    out = torch.nn.functional.scaled_dot_product_attention(*operands, bias, is_causal=causal)
                    found = torch.autograd.grad(out.square().sum(), operands)
                    results.append([x.cpu().float() for x in (out, *found)])
            close = {"rtol": 3e-2, "atol": 3e-2} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
            for here, other in zip(*results, strict=True):
                torch.testing.assert_close(other, here, **close)
            fused = [name for name in names if name in ("efficient_attention", "flash_attention")]
            assert fused == ([kernel] if kernel != "attention_math" else []), (dtype, names)
        kernels.Session.issue = issued

    gpu.call(attends_as_on_the_host)


def test_only_kernels_that_the_program_allows_are_used(gpu: DeviceProcess) -> None:
    def keeps_to_what_is_allowed():
        from torch.nn.attention import SDPBackend, sdpa_kernel

        from millpond.pool import attention

        x = torch.randn(1, 2, 4, 8, dtype=torch.bfloat16, device="pool")
        attend = torch.nn.functional.scaled_dot_product_attention
        expected = attend(x, x, x)
        used = []
        flash, efficient = attention._flash, attention._efficient
        attention._flash = lambda *call: (used.append("flash"), flash(*call))[1]
        attention._efficient = lambda *call: (used.append("efficient"), efficient(*call))[1]
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
            with sdpa_kernel(backend):
                torch.testing.assert_close(attend(x, x, x).cpu(), expected.cpu(), rtol=2e-2, atol=2e-2)
        assert used == ["flash", "efficient"]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), pytest.raises(RuntimeError, match="No available kernel"):
            attend(x, x, x)
        attention._flash, attention._efficient = flash, efficient

    gpu.call(keeps_to_what_is_allowed)


CAPTURED = """
import logging
import torch

torch.manual_seed(2)
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("millpond.pool").addHandler(handler)

def step(q, k, v):
    attended = torch.nn.functional.scaled_dot_product_attention(torch.tanh(q), k, v, is_causal=True)
    return attended.square().sum()

compiled = torch.compile(step)
for dtype in (torch.float32, torch.bfloat16):
    for _ in range(3):
        operands = [torch.randn(2, 2, 6, 8, dtype=dtype, device="pool").requires_grad_() for _ in range(3)]
        eager = torch.autograd.grad(step(*operands), operands)
        captured = torch.autograd.grad(compiled(*operands), operands)
        for one, other in zip(eager, captured, strict=True):
            torch.testing.assert_close(other.cpu(), one.cpu(), rtol=3e-2, atol=3e-2)
assert not said, said
"""


def test_what_is_compiled_attends_by_the_same_kernels(gpu_worker: WorkerProcess) -> None:
    done = gpu_worker.run(CAPTURED, timeout_s=100)
    assert done.returncode == 0, done.stderr
