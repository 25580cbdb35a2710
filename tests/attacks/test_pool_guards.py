"""What kernels take on trust is checked before they run: each case here ended a worker, or kept it busy for ever."""

from __future__ import annotations

import pytest
import torch

from millpond.pool import guards, operators, wire
from millpond.pool.executor import Failure, Memory
from millpond.pool.graphs import GraphExecutor

FAR = 2**40
NAN = float("nan")


def far(*sizes: int) -> torch.Tensor:
    return torch.full(sizes, FAR)


def none(*sizes: int) -> torch.Tensor:
    return torch.zeros(sizes, dtype=torch.int64)


x = torch.ones
POOL2 = [2, 2], [2, 2], [0, 0], [1, 1], False
POOL3 = [2, 2, 2], [2, 2, 2], [0, 0, 0], [1, 1, 1], False
SQUARE = x(3, 3)
SAME = x(2, 0, 3)
HOSTILE = [
    ("max_pool2d_with_indices_backward", x(1, 2, 2, 2), x(1, 2, 4, 4), *POOL2, far(1, 2, 2, 2)),
    ("max_pool2d_with_indices_backward", x(1, 2, 2, 2), x(1, 2, 4, 4), *POOL2, -far(1, 2, 2, 2)),
    ("max_pool3d_with_indices_backward", x(1, 1, 2, 2, 2), x(1, 1, 4, 4, 4), *POOL3, far(1, 1, 2, 2, 2)),
    ("adaptive_max_pool2d_backward", x(1, 1, 2, 2), x(1, 1, 4, 4), far(1, 1, 2, 2)),
    ("adaptive_max_pool3d_backward", x(1, 1, 2, 2, 2), x(9, 9, 4, 4, 4), none(1, 1, 2, 2, 2)),
    ("_adaptive_avg_pool2d_backward", x(1, 2, 3), x(2, 0, 3)),
    ("nll_loss_backward", x(4), x(4, 5), far(4), None, 0, -100, x(())),
    ("nll_loss_backward", x(()), x(0), none(0), None, 1, -100, x(())),
    ("nll_loss2d_backward", x(4, 2, 2), x(4, 5, 2, 2), far(4, 2, 2), None, 0, -100, x(())),
    ("_ctc_loss", x(9, 2, 5), far(2, 3), [9, 9], [3, 3], 0, False),
    ("_ctc_loss_backward", x(2), x(9, 2, 5), none(2, 3), [9, 9], [FAR, 3], x(2), x(2, 9, 7), 0, False),
    ("_ctc_loss_backward", x(2), x(9, 2, 5), none(2, 3), [FAR, 9], [3, 3], x(2), x(2, 9, 7), 0, False),
    ("_ctc_loss_backward", x(2), x(9, 2, 5), none(2, 3), [9, 9], [3, 3], x(2), x(2, 9, 1), 0, False),
    ("embedding_dense_backward", x(3, 3), far(3), 3, -1, True),
    ("_embedding_bag_forward_only", x(2, 3), none(2, 3), none(2, 0, 3), True, FAR, False, None, False, -1),
    ("native_group_norm", x(1, 600, 3), x(600), x(1).expand(600), 1, 600, 3, 2, 0.5),
    (
        *("native_group_norm_backward", x(2, 4, 3, 3).to(memory_format=torch.channels_last)),
        *(x(2, 4, 3, 3).to(memory_format=torch.channels_last), x(2, 2), x(2, 2), x(4), 2, 4, 9, 2, [False, True, True]),
    ),
    ("rrelu_with_noise", x(600), x(1).expand(600), 0.0, 1.0, True),
    ("fractional_max_pool2d_backward", x(1, 3, 2, 3), x(1, 3, 9, 9), [3, 3], [2, 3], none(3, 1, 1).expand(1, 3, 2, 3)),
    (
        *("convolution_backward", x(1, 3, 6, 6), x(1, 3, 4, 4), x(3, 3, 3, 3), [3], [2, 2], [2, 2], [1, 1]),
        *(True, [1, 2**32 + 1], 1, [True, True, True]),
    ),
    ("_linalg_svd.U", SQUARE, True, True, {"U": SQUARE, "S": x(3), "Vh": x(3, 3)}),
    (
        *("_fused_moving_avg_obs_fq_helper", x(1, 2, 4), none(1), none(1), x(2), x(2), x(2), none(2).int()),
        *(0.5, 0, 255, -(2**31), True, True),
    ),
    ("_embedding_bag", x(2, 3), none(1).expand(400), none(2), False, 0, False, x(400)),
    ("_embedding_bag", x(9, 3).T, none(5), none(0), False, 0, False, x(5)),
    ("_embedding_bag_dense_backward", x(1, 3), far(3), none(3), none(1), none(1, 3), 3, False, 0, None),
    ("_embedding_bag_dense_backward", x(1, 3), none(3), far(3), none(1), none(1, 3), 3, False, 0, None),
    ("_embedding_bag_dense_backward", x(1, 3), none(3), none(3), none(0), none(1, 3), 3, False, 1, None),
    ("_embedding_bag_backward", x(1, 3), far(3), none(1), none(3), none(1), none(1, 3), 3, False, 0, False, None),
    *(
        ("_embedding_bag_backward", x(1, 3), none(3), offsets, none(0), none(1), none(1, 3), 3, False, 0, False, None)
        for offsets in (torch.tensor([1]), torch.tensor([0, 1]))
    ),
    ("_embedding_bag_per_sample_weights_backward", x(1, 3), x(3, 3), far(3), none(1), none(3), 0),
    ("_embedding_bag_per_sample_weights_backward", x(1, 3), x(3, 3), none(3), far(1), none(0), 0),
    ("segment_reduce", x(4, 2), "sum", {"offsets": torch.tensor([0, FAR])}),
    ("segment_reduce", x(2, 3), "mean", {"lengths": torch.tensor([-FAR]), "axis": 1, "unsafe": True}),
    ("_segment_reduce_backward", x(2, 2), x(2, 2), x(4, 2), "sum", {"lengths": torch.tensor([FAR, 4])}),
    ("_cdist_backward", x(1), x(400, 2), x(900, 2), 1.0, x(1)),
    ("_pdist_backward", x(8), x(4, 4), 0.5, x(4)),
    ("_pdist_backward", x(0), x(0, 1), 2.0, x(0)),
    ("_scaled_dot_product_flash_attention_for_cpu", x(1, 2, 64, 8), x(9, 9, 64, 8), x(1, 1, 1, 8)),
    ("rrelu_with_noise.out", x(400), x(400), 0.1, 0.3, True, {"out": x(0)}),
    ("batch_norm_update_stats", x(2, 300), x(1), x(1), 0.1),
    ("_linalg_eigvals", torch.full((3, 3), NAN)),
    ("nanmedian.dim", x(2, 1).expand(2, 1000), 1),
    ("nanmedian.dim_values", SAME, 0, False, {"values": SAME, "indices": none(0, 3)}),
    ("div.Tensor_mode", torch.tensor([-(2**63)]), torch.tensor([-1]), {"rounding_mode": "trunc"}),
    ("div_.Scalar_mode", torch.tensor([-(2**31)], dtype=torch.int32), -1, {"rounding_mode": "trunc"}),
    ("random_.from", x(4), 2**63 - 1, None),
    ("randint.low", -(2**63), -(2**63) + 1, [4]),
    ("special_laguerre_polynomial_l", x(1), torch.tensor([FAR])),
    ("special_legendre_polynomial_p.n_scalar", x(1), FAR),
    ("special_zeta", x(1), torch.tensor([0.5 - 2**50], dtype=torch.float64)),
    ("polygamma", 2, torch.tensor([0.5 - 2**50], dtype=torch.float64)),
    ("polygamma_", torch.tensor([0.5 - 2**50], dtype=torch.float64), 2),
    ("repeat_interleave.Tensor", torch.tensor([2**63 - 1, 1])),
    ("binomial", torch.tensor([NAN]), x(1)),
    ("replication_pad2d_backward", x(0, 3, 4, 5), x(5, 3, 4, 4), [1, 0, 0, 0]),
    ("unfold_backward", none(4), [32768, 2], 0, 2**62, 2**48),
    ("reflection_pad1d_backward", x(1, 1, 110), x(1, 1, 5), [1, 2]),
    ("replication_pad2d", x(5, 3, 4, 4), [2**48, 0, 0, 0]),
    ("avg_pool3d_backward", x(2, 3, 1, 2, 2), x(3, 3, 2, 4, 4), [2, 2, 2], [], [0, 0, 0], False, True, None),
    ("_adaptive_avg_pool2d_backward", x(1, 8, 5, 7), x(1, 8, 0, 7)),
    ("adaptive_max_pool3d_backward", x(1, 1, 2, 2, 2), x(1, 1, 4, 4, 4), none(1).expand(1, 1, 2, 2, 2)),
    ("grid_sampler_2d_backward", x(1, 2, 4, 4), x(1, 2, 4, 4), x(1, 7, 7, 2), 0, 0, False, [True, True]),
    ("multi_margin_loss_backward", x(0), x(()), none(), 1, 1.0, None),
    ("multilabel_margin_loss_backward", x(0), x(5), none(5), 1, x(5)),
    ("native_layer_norm_backward", x(1, 2, 3), x(1, 2, 3), [3], x(1, 1, 1), x(0, 1, 1), x(3), x(3), [True] * 3),
    ("lu_unpack", x(7, 5), torch.ones(1, dtype=torch.int32)),
    ("linalg_ldl_solve", x(3, 3), torch.tensor([1, 2, -3], dtype=torch.int32), x(3, 3)),
    ("lcm", torch.tensor([-(2**63)]), torch.tensor([3])),
    ("gelu_backward", x(4), x(2, 4)),
    ("_chunk_cat", [torch.tensor(1.0)], 0, 1),
]
WELL_MEANT = [
    ("max_pool2d_with_indices_backward", x(1, 2, 2, 2), x(1, 2, 4, 4), *POOL2, none(1, 2, 2, 2)),
    ("nll_loss_backward", x(4), x(4, 5), torch.tensor([0, 4, -100, 1]), None, 0, -100, x(())),
    ("_ctc_loss", x(9, 2, 5), torch.tensor([[1, 2, 3], [1, -1, FAR]]), [9, 9], [3, 1], 0, False),
    ("_ctc_loss", x(9, 2, 5), torch.tensor([1, 2, 3, 1]), [9, 9], [3, 1], 0, False),
    ("embedding_dense_backward", x(3, 3), far(3), 3, -1, False),
    ("_embedding_bag_per_sample_weights_backward", x(2, 3), x(3, 3), none(3), torch.tensor([0, 2]), none(0), 0),
    ("segment_reduce", x(4, 2), "sum", {"lengths": torch.tensor([3, 1]), "unsafe": True}),
    ("_cdist_backward", x(2, 4, 9), x(4, 3), x(2, 9, 3), 1.0, x(2, 4, 9)),
    ("_pdist_backward", x(6), x(4, 4), 0.5, x(6)),
    ("_scaled_dot_product_flash_attention_for_cpu", x(1, 4, 64, 8), x(1, 2, 9, 8), x(1, 2, 9, 8)),
    ("nanmedian.dim", x(2, 1).expand(2, 1000), 0),
    ("div.Tensor_mode", torch.tensor([-(2**63)]), torch.tensor([2]), {"rounding_mode": "trunc"}),
    ("div.Tensor_mode", torch.tensor([-128], dtype=torch.int8), torch.tensor([-1]), {"rounding_mode": "trunc"}),
    ("random_.from", x(4), 0, 2**24),
    ("randint", 2**63 - 1, [4]),
    ("special_legendre_polynomial_p.n_scalar", x(1), 7),
    ("special_zeta", x(1) + 1, torch.tensor([-(2.0**50), -7.5])),
    ("polygamma", 3, x(4)),
    ("repeat_interleave.Tensor", torch.tensor([2, 0, 1])),
    ("replication_pad2d_backward", x(5, 3, 4, 7), x(5, 3, 4, 4), [1, 2, 0, 0]),
    ("replication_pad2d", x(5, 3, 4, 4), [1, -1, 2, 0]),
    ("avg_pool2d_backward", x(3, 2, 2), x(3, 4, 4), [2, 2], [], [0, 0], False, True, None),
    ("grid_sampler_2d_backward", x(1, 2, 7, 7), x(1, 2, 4, 4), x(1, 7, 7, 2), 0, 0, False, [True, True]),
    ("multi_margin_loss_backward", x(4), x(4, 5), none(4), 1, 1.0, None, 0),
    ("native_layer_norm_backward", x(1, 2, 3), x(1, 2, 3), [3], x(1, 2, 1), x(1, 2, 1), x(3), x(3), [True] * 3),
    ("linalg_ldl_solve", x(3, 3), torch.tensor([1, -3, -3], dtype=torch.int32), x(3, 3)),
    ("lu_unpack", x(2, 7, 5), torch.ones(2, 5, dtype=torch.int32)),
]


def parts(case):
    name, *arguments = case
    keywords = arguments.pop() if isinstance(arguments[-1], dict) else {}
    return name, arguments, keywords


@pytest.mark.parametrize("case", HOSTILE, ids=[case[0] for case in HOSTILE])
def test_what_would_end_the_worker_is_refused(case):
    name, arguments, keywords = parts(case)
    check = guards.of(f"aten::{name}")
    assert check is not None
    with pytest.raises(RuntimeError, match="it needs"):
        check(*arguments, **keywords)


@pytest.mark.parametrize("case", WELL_MEANT, ids=[case[0] for case in WELL_MEANT])
def test_what_programs_send_passes_and_runs(case):
    name, arguments, keywords = parts(case)
    check, op = guards.of(f"aten::{name}"), operators.resolve(f"aten::{name}")
    assert check is not None
    assert op is not None
    check(*arguments, **keywords)
    op(*arguments, **keywords)


def test_every_guard_is_of_an_op_that_a_worker_runs():
    packets = {name.removeprefix("aten::").partition(".")[0] for name in operators.allowed()}
    overloads = {name.removeprefix("aten::") for name in operators.allowed()}
    assert guards._GUARDS.keys() <= packets | overloads


@pytest.mark.parametrize("in_graph", [False, True])
def test_an_output_whose_new_sizes_overflow_keeps_those_that_it_had(in_graph):
    """Whoever only asks such a tensor for its strides is ended by it."""
    executor = GraphExecutor(torch.device("cpu"), Memory(2**20))
    image = wire.Geometry("float32", (1, 2, 4, 4), (32, 16, 4, 1))
    plan = wire.Define(0, "aten::adaptive_avg_pool2d.out", [wire.Operand(0), [2**62, 0]], {"out": wire.Operand(1)}, [])
    puts = [wire.Put(handle, "float32", (1, 2, 4, 4), bytes(128)) for handle in (1, 2)]
    graph = wire.DefineGraph(0, [image, image], [wire.Step(0, [0, 1])], [])
    run = wire.Run(0, [1, 2], 3) if in_graph else wire.Call(0, [1, 2], 3)
    with torch.inference_mode():
        answers = list(executor.run(wire.Batch([*puts, plan, graph, run, wire.Read(2, 0, 128)]), memoryview(b"")))
    assert [type(answer) for answer, _ in answers] == [wire.Failed, wire.Data]
    assert executor._tensor(2).stride() == (32, 16, 4, 1)
    with pytest.raises(Failure):
        executor._tensor(3)
    executor.close()
