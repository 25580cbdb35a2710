"""A program's default dtype is the pool device's too, and one program's is not another's."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from millpond.pool import default_dtype
from millpond.pool.default_dtype import DefaultDtype
from pool.test_device import on_device


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
    single, double = DefaultDtype(torch.float32), DefaultDtype(torch.float64)
    order: list[tuple[str, torch.dtype]] = []

    def enter(name: str, default: DefaultDtype) -> None:
        with default:
            order.append((name, torch.get_default_dtype()))

    def wait_for(waiting: int) -> None:
        until = time.monotonic() + 10
        while default_dtype._waiting < waiting:
            assert time.monotonic() < until
            time.sleep(0.001)

    with single:
        beside = threading.Thread(target=enter, args=("beside", single))
        beside.start()
        beside.join(10)
        other = threading.Thread(target=enter, args=("other", double))
        other.start()
        wait_for(1)
        newcomer = threading.Thread(target=enter, args=("newcomer", single))
        newcomer.start()
        wait_for(2)
        assert order == [("beside", torch.float32)]
    for thread in (other, newcomer):
        thread.join(10)
    with single:  # as other tests expect it
        assert sorted(order[1:]) == [("newcomer", torch.float32), ("other", torch.float64)]
