"""What a program sets for its whole process counts on the pool device too, and one program's is not another's."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from millpond.pool import numerics, wire
from millpond.pool.numerics import Setting
from pool.test_device import on_device
from waiting import wait_for


@on_device
def test_integers_and_numbers_are_promoted_by_the_default_dtype():
    def work(device):
        a = torch.arange(1, 7, device=device).reshape(2, 3)
        flags = a > 2
        yield from (a / a, a / 3, a * 1.5, a + flags * 0.1, a.sqrt(), flags.sin(), a**2.5, 2.5**a, a.atan2(a), a - 1j)
        yield from (torch.clamp(a, 1.5), a.remainder(1.5), a.fmod(0.7), torch.mean(a / 7, 0), a.logit(0.1))
        yield from (a == 2.3, 16777217 * a == 16777216.0 * a, torch.add(a, 1.1, out=torch.empty(2, 3, device=device)))
        yield from torch._foreach_div([a, a], 3)
        yield from (torch.zeros(2, device=device), torch.full((2,), 1.5, device=device), torch.eye(2, device=device))
        yield from (torch.full((2,), 1j, device=device), torch.arange(0, 1, 0.3, device=device))
        yield from (torch.linspace(0, 1, 5, device=device), torch.logspace(0, 1, 5, device=device))
        yield from (torch.tensor([1.5, 2], device=device), torch.scalar_tensor(3, device=device))
        yield torch.linspace(torch.tensor(0.0, device=device), 1.0, 5, device=device)
        yield torch.hann_window(5, device=device)
        torch.manual_seed(3)
        yield from (
            torch.rand(3, device=device),
            torch.randn(2, 2, device=device),
            torch.empty(3, device=device).zero_(),
        )

    try:
        for default in (torch.float64, torch.float32, torch.bfloat16, torch.float64, torch.float32):
            torch.set_default_dtype(default)
            for place, (there, host) in enumerate(zip(work("pool"), work("cpu"), strict=True)):
                assert there.dtype == host.dtype, (default, place)
                torch.testing.assert_close(there.cpu(), host, msg=f"{default} {place}", rtol=0, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


@on_device
def test_gradients_follow_the_default_dtype_of_the_forward_pass():
    def gradient(device):
        weight = torch.tensor([1.0, 2.0, 3.0], device=device, requires_grad=True)
        counts = torch.arange(3, device=device)
        ((counts / 7) * weight * (counts * 0.3).exp()).sum().backward()
        return weight.grad

    try:
        for default in (torch.float32, torch.float64, torch.float32):
            torch.set_default_dtype(default)
            there, host = gradient("pool"), gradient("cpu")
            assert there.dtype == host.dtype == default
            torch.testing.assert_close(there.cpu(), host)
    finally:
        torch.set_default_dtype(torch.float32)


@on_device
def test_deterministic_algorithms_are_the_workers_too():
    def work(device):
        yield torch.empty(3, device=device)  # filled, so that what reads it repeats
        with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
            torch.zeros(4, device=device).put_(torch.tensor([1], device=device), torch.ones(1, device=device)).cpu()

    torch.use_deterministic_algorithms(True)
    try:
        for there, host in zip(work("pool"), work("cpu"), strict=True):
            torch.testing.assert_close(there.cpu(), host, equal_nan=True)
            assert host.isnan().all()
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.zeros(4, device="pool").put_(torch.tensor([1], device="pool"), torch.ones(1, device="pool")).cpu()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.zeros(4, device="pool").put_(torch.tensor([1], device="pool"), torch.ones(1, device="pool")).cpu()


@on_device
def test_float32_products_are_as_precise_as_the_program_asks_for():
    torch.manual_seed(3)
    host = torch.randn(64, 64)
    there = host.to("pool")
    try:
        for precision in ("highest", "medium", "high", "highest"):  # a processor without bfloat16 computes them alike
            torch.set_float32_matmul_precision(precision)
            assert torch.equal((there @ there).cpu(), host @ host), precision
    finally:
        torch.set_float32_matmul_precision("highest")


def set_all():
    """Yield after each setting that a program can make, with what it comes to."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    torch.set_default_dtype(torch.bfloat16)
    yield {"default_dtype": "bfloat16"}
    matmul.allow_tf32 = True
    yield {"matmul_precision": "high"}
    torch.set_float32_matmul_precision("medium")
    yield {"matmul_precision": "medium"}
    cudnn.allow_tf32 = False
    yield {"conv_tf32": False, "rnn_tf32": False}
    matmul.allow_fp16_reduced_precision_reduction = False
    yield {"fp16_reduction": (False, True)}
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    yield {"bf16_reduction": (False, False)}
    matmul.allow_fp16_accumulation = True
    yield {"fp16_accumulation": True}
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield {"deterministic": True, "deterministic_warns": True}
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield {"deterministic_fill": False}
    cudnn.enabled = False
    yield {"cudnn": False}
    cudnn.benchmark = cudnn.deterministic = True
    yield {"cudnn_benchmark": True, "cudnn_deterministic": True}
    torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = "tf32"  # the newer settings, beside which the older ones cannot be read
    cudnn.conv.fp32_precision = "tf32"
    yield {"matmul_precision": "high", "conv_tf32": True}


def start_over():
    """Make all settings PyTorch's own again, whoever made others."""
    numerics._settings = None  # as in a process that nobody has set to anything yet
    with Setting(wire.Numerics()):
        pass


@pytest.mark.skipif("MILLPOND_POOL_LEASE" in os.environ, reason="this process has a lease")
def test_every_setting_is_read_and_made_anew_elsewhere():
    start_over()
    assert numerics.described(numerics.current()) == wire.Numerics()
    expected: dict[str, object] = {}
    try:
        with torch.backends.__allow_nonbracketed_mutation():  # PyTorch's own tests forbid it where they are imported
            for told in set_all():
                expected |= told
                now = numerics.described(numerics.current())
                assert now == wire.Numerics(**expected)
                start_over()
                assert numerics.described(numerics.current()) == wire.Numerics()
                with Setting(now):
                    assert numerics.described(numerics.current()) == now
    finally:
        start_over()
    assert len(expected) == len(wire.Numerics.__struct_fields__)


PROGRAM = """
import torch
torch.set_default_dtype(torch.{default})
counts = torch.arange(1, 200, device="pool")
host = torch.arange(1, 200)
for n in range(1, 300):
    assert torch.equal(((counts / n).sqrt() * 0.1).cpu(), (host / n).sqrt() * 0.1), n
"""


@pytest.mark.slow
def test_programs_with_different_defaults_share_a_worker(worker):
    """Two processes that import PyTorch."""
    with ThreadPoolExecutor() as programs:
        ended = programs.map(
            lambda default: worker.run(PROGRAM.format(default=default), timeout_s=100),
            ("float32", "float64"),
        )
    assert [(process.returncode, process.stderr) for process in ended] == [(0, "")] * 2


def test_another_default_waits_for_what_runs_and_newcomers_wait_with_it():
    single, double = Setting(wire.Numerics()), Setting(wire.Numerics("float64"))
    order: list[tuple[str, torch.dtype]] = []
    start_over()

    def enter(name: str, default: Setting) -> None:
        with default:
            order.append((name, torch.get_default_dtype()))

    with single:
        beside = threading.Thread(target=enter, args=("beside", single))
        beside.start()
        beside.join(10)
        other = threading.Thread(target=enter, args=("other", double))
        other.start()
        wait_for(lambda: numerics._waiting >= 1, 10)
        newcomer = threading.Thread(target=enter, args=("newcomer", single))
        newcomer.start()
        wait_for(lambda: numerics._waiting >= 2, 10)
        assert order == [("beside", torch.float32)]
    for thread in (other, newcomer):
        thread.join(10)
    with single:  # as other tests expect it
        assert sorted(order[1:]) == [("newcomer", torch.float32), ("other", torch.float64)]
