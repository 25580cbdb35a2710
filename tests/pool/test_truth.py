"""What a program is told when the worker cannot do as it asked: as it uploads, and within its backward pass."""

from __future__ import annotations

import pytest
import torch

from pool.test_device import on_device

pytestmark = pytest.mark.slow  # each fills a gigabyte


@on_device
def test_an_upload_that_does_not_fit_is_out_of_memory_and_the_program_can_go_on():
    _, total = torch.pool.mem_get_info()
    kept = []
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory\. Tried to allocate"):  # noqa: PT012
        for _ in range(total // 2**26 + 1):
            kept.append(torch.ones(2**24).to("pool"))
            torch.pool.synchronize()
    assert len(kept) > 10
    kept.clear()
    assert torch.ones(2**24).to("pool").sum().item() == 2**24


@on_device
def test_out_of_memory_within_backward_is_raised_there_and_the_program_can_go_on():
    torch.pool.synchronize()
    free, _ = torch.pool.mem_get_info()
    x = torch.ones(free // 4 // 4, device="pool", requires_grad=True)
    y = x.exp() * 2  # three of a quarter each; backward needs two more
    with pytest.raises(torch.OutOfMemoryError) as raised:  # noqa: PT012
        y.sum().backward()
        torch.pool.synchronize()
    assert "backward" in str(raised.value)
    del x, y
    raised = None
    small = torch.ones(3, device="pool", requires_grad=True)
    small.exp().sum().backward()
    assert small.grad.sum().item() == pytest.approx(3 * 2.7182818)


@on_device
def test_an_error_within_backward_names_the_op_and_the_line_of_its_forward():
    free, _ = torch.pool.mem_get_info()
    x = torch.ones(free // 5 // 4, device="pool", requires_grad=True)
    y = x * x  # the line whose backward needs too much
    rest = torch.ones(free // 2 // 4, device="pool")
    loss = y.sum()
    loss.item()
    with pytest.raises(torch.OutOfMemoryError) as raised:  # noqa: PT012
        loss.backward()
        torch.pool.synchronize()
    text = str(raised.value)
    assert rest is not None
    assert "in aten::mul.Tensor(float32[" in text
    assert "in the backward of " in text
    assert "of_its_forward.py:4, in test_an_error_within_backward" in text
