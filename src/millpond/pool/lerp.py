"""Puts together again what Dynamo takes apart for a compiler to fuse: the interpolation of an optimizer's averages.

`torch._foreach_lerp_(averages, gradients, weight)` arrives as a difference of all tensors, a tensor full of the weight
for each of them, and a product that is added (`torch._dynamo.polyfills.foreach_lerp_inplace`). A worker fuses nothing:
that is two ops and three passes through memory more for each parameter than the op itself, which it has.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node


def fuse(module: GraphModule) -> None:
    """Replace the parts of each interpolation by the op, in place."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=torch._foreach_addcmul_):
        parts = _parts(node)
        if parts is None:
            continue
        ends, weight, made = parts
        with graph.inserting_before(node):
            graph.call_function(torch._foreach_lerp_, (node.args[0], ends, weight))
        for part in (node, *made):
            graph.erase_node(part)
    module.recompile()


def _parts(node: Node) -> tuple[Any, float, list[Node]] | None:
    """Return an interpolation's ends, its weight and what it is made of, last first; None for something else."""
    if len(node.args) != 3 or node.kwargs or not all(isinstance(argument, (list, tuple)) for argument in node.args):
        return None
    starts, weights, differences = (list(argument) for argument in node.args)  # type: ignore[arg-type]
    fills = [x for x in weights if _is_call(x, torch.full_like) and len(x.args) == 2 and not x.kwargs]
    if not starts or len(fills) != len(starts) or any(set(x.users) != {node} for x in fills):
        return None
    values = {x.args[1] for x in fills}
    items = [x for x in differences if _is_call(x, operator.getitem)]
    if len(values) != 1 or [x.args[0] for x in fills] != differences or len(items) != len(differences):
        return None
    (weight,), (difference, *others) = values, {x.args[0] for x in items}
    whole = not others and [x.args[1] for x in items] == list(range(len(items))) and set(difference.users) == set(items)
    if not whole or not _is_call(difference, torch._foreach_sub) or difference.kwargs or len(difference.args) != 2:
        return None
    ends, subtracted = difference.args
    alone = all(set(x.users) == {node, fill} for x, fill in zip(items, fills, strict=True))
    if not alone or not isinstance(weight, float) or not isinstance(subtracted, (list, tuple)):
        return None
    return (ends, weight, [*fills, *items, difference]) if list(subtracted) == starts else None


def _is_call(value: Any, function: Any) -> bool:
    return isinstance(value, Node) and value.op == "call_function" and value.target is function
