"""An optimizer's interpolation is one op again after Dynamo, and nothing else becomes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from millpond.pool import lerp

pytestmark = pytest.mark.slow  # imports PyTorch's compiler


def traced(function: Callable[..., Any], *inputs: Any) -> tuple[list[str], Any]:
    """Return the names of the ops that a function comes to, fused, and what the fused graph returns."""
    names: list[str] = []

    def backend(module: torch.fx.GraphModule, examples: Any) -> Callable[..., Any]:
        lerp.fuse(module)
        names.extend(node.target.__name__ for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    torch._dynamo.reset()
    return names, torch.compile(function, backend=backend, fullgraph=True)(*inputs)


def pairs(count: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return tuple([torch.randn(4, 3, generator=generator) for _ in range(count)] for _ in range(2))  # type: ignore[return-value]


def test_an_interpolation_is_one_op() -> None:
    def step(starts: list[torch.Tensor], ends: list[torch.Tensor]) -> list[torch.Tensor]:
        torch._foreach_lerp_(starts, ends, 0.1)
        return starts

    names, results = traced(step, *pairs())
    assert names == ["_foreach_lerp_"]
    for result, expected in zip(results, step(*pairs()), strict=True):
        assert torch.equal(result, expected)


def test_two_are_two() -> None:
    def step(starts: list[torch.Tensor], ends: list[torch.Tensor]) -> list[torch.Tensor]:
        torch._foreach_lerp_(starts, ends, 0.1)
        torch._foreach_lerp_(ends, starts, 0.2)
        return ends

    names, results = traced(step, *pairs(1))
    assert names == ["_foreach_lerp_", "_foreach_lerp_"]
    assert torch.equal(results[0], step(*pairs(1))[0])


@pytest.mark.parametrize("weight", [0.5, 0.9])
def test_what_dynamo_writes_otherwise_stays(weight: float) -> None:
    def step(starts: list[torch.Tensor], ends: list[torch.Tensor]) -> list[torch.Tensor]:
        torch._foreach_lerp_(starts, ends, weight)
        return starts

    names, results = traced(step, *pairs())
    assert "_foreach_lerp_" not in names
    for result, expected in zip(results, step(*pairs()), strict=True):
        torch.testing.assert_close(result, expected)


def of_other_tensors(starts: list[torch.Tensor], ends: list[torch.Tensor]) -> Any:
    difference = torch._foreach_sub(ends, ends)
    torch._foreach_addcmul_(starts, [torch.full_like(x, 0.1) for x in difference], difference)
    return starts


def whose_difference_is_used(starts: list[torch.Tensor], ends: list[torch.Tensor]) -> Any:
    difference = torch._foreach_sub(ends, starts)
    torch._foreach_addcmul_(starts, [torch.full_like(x, 0.1) for x in difference], difference)
    return starts, difference


def of_several_weights(starts: list[torch.Tensor], ends: list[torch.Tensor]) -> Any:
    difference = torch._foreach_sub(ends, starts)
    weights = [torch.full_like(x, 0.1 + place / 10) for place, x in enumerate(difference)]
    torch._foreach_addcmul_(starts, weights, difference)
    return starts


def in_another_order(starts: list[torch.Tensor], ends: list[torch.Tensor]) -> Any:
    difference = torch._foreach_sub(ends, starts)[::-1]
    torch._foreach_addcmul_(starts, [torch.full_like(x, 0.1) for x in difference], difference)
    return starts


@pytest.mark.parametrize("step", [of_other_tensors, whose_difference_is_used, of_several_weights, in_another_order])
def test_what_only_resembles_it_stays(step: Callable[..., Any]) -> None:
    names, results = traced(step, *pairs())
    assert "_foreach_lerp_" not in names
    torch.testing.assert_close(results, step(*pairs()))
