"""A lease of two devices: what a program does with `cuda:1`, with gradients across both, and with all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TWO_STAGES = Path(__file__).parent / "programs/two_stages.py"


def test_a_tensor_is_made_on_the_device_that_is_named(two_devices):
    def program():
        for there in (
            torch.ones(2, device="cuda:1"),
            torch.ones(2).to("cuda:1"),
            torch.ones(2).cuda(1),
            torch.ones(2).to(1),
            torch.ones(2, device="pool:1"),
            torch.nn.Linear(2, 2, device="cuda:1").weight,
            torch.ones(2, device="cuda:1").new_zeros(3),
            torch.randn_like(torch.ones(2, device="cuda:1")),
            torch.tensor([1], device="cuda:1"),
        ):
            assert there.device == torch.device("cuda", 1)
        assert torch.cuda.device_count() == torch.accelerator.device_count() == 2
        with pytest.raises(Exception, match=r"cuda:2 does not exist: lease lease-1 has 2 device"):
            torch.ones(2, device="cuda:2")

    two_devices.call(program)


def test_the_current_device_is_what_cuda_without_an_index_means(two_devices):
    def program():
        def made():
            plain, cuda, there = torch.ones(2), torch.ones(2, device="cuda"), torch.ones(2, device="pool")
            return {t.device.index for t in (cuda, there, plain.cuda(), plain.to("cuda"), plain.to("pool"))}

        assert made() == {0}
        torch.cuda.set_device(1)
        try:
            assert made() == {1}
            assert torch.cuda.current_device() == torch.accelerator.current_device_index() == 1
        finally:
            torch.accelerator.set_device_index(0)
        assert made() == {0}
        with torch.cuda.device(1):
            assert made() == {1}
        with torch.accelerator.device_index(1):
            assert made() == {1}
        with torch.cuda.stream(torch.cuda.Stream(1)):
            assert made() == {1}
        assert made() == {0}

    two_devices.call(program)


def test_each_thread_has_its_own_current_device(two_devices):
    def program():
        import threading

        seen = []
        torch.cuda.set_device(1)
        try:
            thread = threading.Thread(target=lambda: seen.append(torch.ones(1, device="cuda").device.index))
            thread.start()
            thread.join()
        finally:
            torch.cuda.set_device(0)
        assert seen == [0]

    two_devices.call(program)


def test_gradients_of_the_second_device_and_across_both(two_devices):
    def program():
        import threading

        def train():
            first = torch.ones(3, device="cuda:0", requires_grad=True)
            second = torch.full((3,), 5.0, device="cuda:1", requires_grad=True)
            (first.to("cuda:1") * 2 * second + first.to("cuda:1")).to("cuda:0").sum().backward()
            assert first.grad.tolist() == [11.0] * 3
            assert second.grad.tolist() == [2.0] * 3
            assert (first.grad.device.index, second.grad.device.index) == (0, 1)
            (grad,) = torch.autograd.grad((second**2).sum(), second, create_graph=True)
            assert torch.autograd.grad(grad.sum(), second)[0].tolist() == [2.0] * 3
            done.append(True)

        done = []
        train()
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        assert len(done) == 2

    two_devices.call(program)


def test_checkpointing_on_the_second_device(two_devices):
    def program():
        from torch.utils.checkpoint import checkpoint

        layer = torch.nn.Linear(3, 3, device="cuda:1")
        given = torch.ones(2, 3, device="cuda:0", requires_grad=True)
        for reentrant in (False, True):
            given.grad = None
            checkpoint(layer, given.to("cuda:1"), use_reentrant=reentrant).sum().backward()
            assert torch.allclose(given.grad[0].cpu(), layer.weight.sum(0).cpu())

    two_devices.call(program)


def test_random_numbers_of_each_device(two_devices):
    def program():
        torch.manual_seed(3)
        assert torch.rand(4, device="cuda:0").tolist() == torch.rand(4, device="cuda:1").tolist()
        state = torch.cuda.get_rng_state(1)
        drawn = torch.rand(4, device="cuda:1").tolist()
        torch.rand(4, device="cuda:0")
        torch.cuda.set_rng_state(state, 1)
        assert torch.rand(4, device="cuda:1").tolist() == drawn
        with torch.cuda.device(1):
            torch.cuda.manual_seed(3)
        assert torch.rand(4, device="cuda:1").tolist() != torch.rand(4, device="cuda:0").tolist()
        generator = torch.Generator(device="cuda:1").manual_seed(7)
        again = torch.Generator(device="cuda:0").manual_seed(7)
        assert generator.device == torch.device("cuda", 1)
        one = torch.rand(4, device="cuda:1", generator=generator)
        assert one.tolist() == torch.rand(4, device="cuda:0", generator=again).tolist()

    two_devices.call(program)


def test_memory_figures_of_each_device(two_devices):
    def program():
        before = torch.cuda.memory_allocated(0), torch.cuda.memory_allocated(1)
        kept = torch.ones(1000, device="cuda:1")
        assert torch.cuda.memory_allocated(0) == before[0]
        assert torch.cuda.memory_allocated(1) == before[1] + kept.numel() * 4
        assert torch.cuda.mem_get_info("cuda:1")[1] == 2**30
        assert torch.cuda.get_device_properties(1).multi_processor_count == 1

    two_devices.call(program)


def test_operands_on_two_devices_raise_pytorchs_error(two_devices):
    def program():
        one, other = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
        for mix in (
            lambda: one + other,
            lambda: one.add_(other),
            lambda: torch.cat([one, other]),
            lambda: torch.nn.functional.mse_loss(one, other),
            lambda: one * other[0],
        ):
            with pytest.raises(
                RuntimeError, match=r"on the same device, but found at least two devices, cuda:[01] and"
            ):
                mix()

    two_devices.call(program)


def test_data_parallel_is_the_same_as_one_device(two_devices):
    def program():
        import copy

        torch.manual_seed(0)
        host = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        spread = torch.nn.DataParallel(copy.deepcopy(host).cuda())
        batch = torch.randn(7, 4)
        answer = spread(batch.cuda())
        assert answer.device == torch.device("cuda", 0)
        assert torch.allclose(answer.cpu(), host(batch), atol=1e-6)
        answer.square().mean().backward()
        host(batch).square().mean().backward()
        for ours, theirs in zip(spread.parameters(), host.parameters(), strict=True):
            assert torch.allclose(ours.grad.cpu(), theirs.grad, atol=1e-6)

    two_devices.call(program)


def losses(command: list[str], environ: dict[str, str]) -> list[float]:
    environ = {**environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [float(line) for line in done.stdout.split()]


@pytest.mark.slow
def test_a_model_in_two_stages_trains_as_on_one_device(two_workers):
    command = [sys.executable, str(TWO_STAGES)]
    apart = losses([*command, "cuda:0", "cuda:1"], two_workers.environment())
    together = losses([*command, "cuda:0", "cuda:0"], two_workers.environment())
    assert len(apart) == 20
    assert apart[-1] < apart[0]
    assert apart == pytest.approx(together, abs=1e-5)
    assert apart == pytest.approx(losses([*command, "cpu", "cpu"], dict(os.environ)), abs=1e-5)
