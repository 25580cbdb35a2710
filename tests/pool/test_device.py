"""The pool device behaves as PyTorch's own devices do. Each test runs in a process that has one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch


def on_device(function: Callable[[], None]) -> Callable[..., None]:
    """Run a test in the process that has the device; `torch` and `pytest` are there, all else it imports."""

    @functools.wraps(function)
    def test(device_process):
        device_process.call(function)

    del test.__wrapped__  # pytest would take the fixtures from it
    return test


@on_device
def test_the_pool_is_the_accelerator():
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator() == torch.device("pool")
    assert torch.pool.device_count() == 1
    assert torch.ones(2, device="pool").device == torch.device("pool:0")
    assert torch.ones(2).to(torch.accelerator.current_accelerator()).is_pool


@on_device
def test_what_the_wire_has_no_form_for_is_refused_and_the_session_goes_on():
    one = torch.ones(1, device="pool")
    for call in (
        lambda: torch.ones([1] * 65, device="pool"),
        lambda: one.reshape([1] * 65).sum(),
        lambda: torch.ones([1] * 65).to("pool"),
    ):
        with pytest.raises(RuntimeError, match="only tensors with up to 64 dims are supported"):
            call()
    for call in (
        lambda: torch.empty(2**53, device="pool"),
        lambda: torch.empty(2**40, 2**20, device="pool"),
        lambda: torch.randperm(2**53 + 2, device="pool"),
        lambda: one.expand(2**53).sum(),
        lambda: one.repeat(2**50),
        lambda: torch.zeros(0, device="pool").resize_(2**53),
    ):
        with pytest.raises(torch.OutOfMemoryError, match="none holds a tensor of"):
            call()
    with pytest.raises(RuntimeError, match=r"aten::cat\(.*\) is no call that the pool can send"):
        torch.cat([one] * 70_000)
    assert torch.equal(one.cpu(), torch.ones(1))


@on_device
def test_ranges_fill_an_output_of_any_shape_with_as_many_elements():
    import warnings

    for fill in (
        lambda out: torch.arange(4, out=out),
        lambda out: torch.arange(1, 8, 2, out=out),
        lambda out: torch.linspace(0, 1, 4, out=out),
        lambda out: torch.logspace(0, 3, 4, out=out),
    ):
        for shape in ((2, 2), (4,)):
            whole = [torch.zeros(2, 3, device=device) for device in ("pool", "cpu")]
            outs = [tensor[:, 1:] if shape == (2, 2) else tensor.reshape(-1)[:4] for tensor in whole]
            made = [fill(out) for out in outs]
            assert made[0].shape == made[1].shape == shape
            assert torch.equal(whole[0].cpu(), whole[1])
    with warnings.catch_warnings(action="ignore"):  # that an output with elements is resized
        assert torch.equal(torch.arange(4, out=torch.ones(2, device="pool")).cpu(), torch.arange(4.0))


@on_device
def test_convolutions_keep_their_channels_last():
    for dims, last in ((2, torch.channels_last), (3, torch.channels_last_3d)):
        for transposed in (False, True):
            kind = getattr(torch.nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
            for of_input, of_weight in ((last, last), (last, torch.contiguous_format), (torch.contiguous_format, last)):
                seen = []
                for device in ("cpu", "pool"):
                    torch.manual_seed(1)
                    layer = kind(4, 6, 3).to(device).to(memory_format=of_weight)
                    x = torch.randn(2, 4, *[6] * dims).to(device).contiguous(memory_format=of_input).requires_grad_()
                    out = layer(x)
                    gradients = torch.autograd.grad(out.square().sum(), [x, layer.weight])
                    seen.append([out.detach(), *gradients])
                for here, there in zip(*seen, strict=True):
                    assert there.stride() == here.stride(), (kind, of_input, of_weight)
                    torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)


@on_device
def test_an_empty_output_of_adaptive_pooling_has_no_gradient_in_pytorchs_own_words():
    x = torch.ones(1, 2, 5, 4, device="pool", requires_grad=True)

    def learn():
        torch.nn.functional.adaptive_avg_pool2d(x, 0).sum().backward()
        torch.pool.synchronize()

    with pytest.raises(RuntimeError, match="Expected grad_output to have non-zero size"):
        learn()


@on_device
def test_an_empty_batch_passes_attention():
    layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True, dropout=0)
    rows = torch.zeros(0, 5, 16, device="pool", requires_grad=True)
    result = layer.to("pool")(rows)
    result.sum().backward()
    assert result.shape == rows.grad.shape == (0, 5, 16)
    assert not layer.linear1.weight.grad.any()


@on_device
def test_bags_of_embeddings_learn_alike_whatever_their_offsets_are():
    def gradients(device):
        torch.manual_seed(3)
        indices = torch.randint(0, 9, (6,))
        for ends, sparse, mode in (
            (False, False, "sum"),
            (True, False, "mean"),
            (True, True, "sum"),
            (True, False, "max"),
        ):
            for kind, other in ((torch.int64, torch.int64), (torch.int32, torch.int64), (torch.int64, torch.int32)):
                bags = torch.nn.EmbeddingBag(9, 4, sparse=sparse, mode=mode, include_last_offset=ends).to(device)
                offsets = torch.tensor([0, 2, 2, 5] + ([6] if ends else []), dtype=other)
                sums = bags(indices.to(kind).to(device), offsets.to(device))
                (sums * torch.arange(sums.numel(), device=device).reshape(sums.shape)).sum().backward()
                yield from (sums, bags.weight.grad.to_dense())

    for there, host in zip(list(gradients("pool")), list(gradients("cpu")), strict=True):
        torch.testing.assert_close(there.cpu(), host)


@on_device
def test_nested_tensors_are_jagged():
    def work(device):
        torch.manual_seed(3)
        rows = [torch.randn(length, 3).to(device).requires_grad_() for length in (2, 0, 4, 1)]
        layer = torch.nn.Linear(3, 5).to(device)
        nested = layer(torch.nested.as_nested_tensor(rows, layout=torch.jagged)).relu()
        padded = torch.nested.to_padded_tensor(nested, -1.0)
        padded.square().sum().backward()
        yield from (nested.values(), padded, layer.weight.grad, *(row.grad for row in rows))
        again = torch.nested.narrow(padded.detach(), 1, 0, torch.tensor([2, 1, 3, 0]).to(device), layout=torch.jagged)
        yield from (again.contiguous().values(), again.sum())

    for there, host in zip(work("pool"), work("cpu"), strict=True):
        torch.testing.assert_close(there.cpu(), host)
    for rows in ([torch.ones(2, device="pool", requires_grad=True)] * 2, [torch.ones(2, device="pool")]):
        with pytest.raises(NotImplementedError, match=r"layout=torch\.jagged"):
            torch.nested.as_nested_tensor(rows)


@on_device
def test_an_output_is_resized_to_the_strides_that_the_op_gives_it():
    for host in (torch.rand(2, 3, 4), torch.rand(2, 3, 8)[:, :, ::2]):
        for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
            operand = host.permute(order)
            expected = torch.eq(operand, operand, out=torch.empty(0, dtype=torch.bool))
            there = torch.empty(0, dtype=torch.bool, device="pool")
            assert torch.eq(operand.to("pool"), operand.to("pool"), out=there).stride() == expected.stride()
            assert torch.equal(there.cpu(), expected)


@on_device
def test_a_part_of_a_storage_is_refused_in_words_that_say_what_to_do():
    part = torch.ones(4, device="pool").untyped_storage()[4:8]
    with pytest.raises(RuntimeError, match="Take parts of tensors, not of storages"):
        torch.empty(0, device="pool").set_(part).clone()


@on_device
def test_values_of_every_dtype_come_back_as_they_went():
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16"):
        host = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, name))
        assert torch.equal(host.to("pool").cpu(), host), name
    for host in (
        torch.tensor([True, False]),
        torch.tensor([1 + 2j, 3 - 4j]),
        torch.tensor(7),
        torch.empty(0, 3),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(8).to(torch.float8_e4m3fn),
    ):
        assert torch.equal(host.to("pool").cpu().float(), host.float()) if not host.is_complex() else True
        assert host.to("pool").dtype == host.dtype
    complex_ = torch.tensor([1 + 2j, 3 - 4j])
    assert torch.equal(complex_.to("pool").cpu(), complex_)
    assert torch.equal(complex_.to("pool").conj().cpu(), complex_.conj())
    assert torch.equal((complex_.to("pool").conj().imag * 2).cpu(), complex_.conj().imag * 2)


@on_device
def test_a_tensor_larger_than_a_frame_goes_there_and_back():
    host = torch.arange(20 * 2**20, dtype=torch.int32)  # 80 MiB; a frame carries 64
    there = host.to("pool")
    assert torch.equal(there.cpu(), host)
    assert there[-1].item() == host[-1].item()


@on_device
def test_views_share_memory_and_writes_show_through_them():
    base = torch.zeros(4, 4, device="pool")
    base[1] = 1.0
    base[:, 2].add_(5)
    base.t()[3, 0] = 7.0
    base.view(-1)[::5].mul_(2)
    host = torch.zeros(4, 4)
    host[1] = 1.0
    host[:, 2].add_(5)
    host.t()[3, 0] = 7.0
    host.view(-1)[::5].mul_(2)
    assert torch.equal(base.cpu(), host)
    assert base[1].untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    assert base[1].data_ptr() == base.data_ptr() + 16
    assert base.storage_offset() == 0
    assert base[2].storage_offset() == 8
    assert base._version == base.detach()._version


@on_device
def test_indexing_of_every_kind_gives_what_the_host_gives():
    host = torch.arange(60.0).reshape(3, 4, 5)
    there = host.to("pool")
    mask = host > 20
    rows = torch.tensor([2, 0])
    for index in (1, (slice(None), 2), (..., slice(1, 4)), mask, rows, (rows, slice(None), rows), None):
        on_pool = tuple(
            i.to("pool") if isinstance(i, torch.Tensor) else i
            for i in (index if isinstance(index, tuple) else (index,))
        )
        assert torch.equal(there[on_pool].cpu(), host[index])
    assert torch.equal(there[rows].cpu(), host[rows])  # indices in the host's memory, as on a GPU
    assert torch.equal(there.nonzero().cpu(), host.nonzero())
    assert torch.equal(there.unique().cpu(), host.unique())
    there[mask.to("pool")] = -1
    host[mask] = -1
    assert torch.equal(there.cpu(), host)


@on_device
def test_plain_values_come_out_as_python_has_them():
    there = torch.tensor([1.5, 2.5], device="pool")
    assert there.sum().item() == 4.0
    assert there.tolist() == [1.5, 2.5]
    assert bool((there > 1).all())
    assert float(there[0]) == 1.5
    assert torch.equal(there, there.clone())
    assert not torch.equal(there, there + 1)
    assert "device='pool:0'" in repr(there)
    assert [int(i) for i in torch.arange(3, device="pool")] == [0, 1, 2]


@on_device
def test_what_the_host_only_has_is_refused_in_pytorchs_words():
    there, host = torch.ones(2, device="pool"), torch.ones(2)
    for action, kind, words in (
        (there.numpy, TypeError, "can't convert pool:0 device type tensor to numpy"),
        (lambda: there + host, RuntimeError, "Expected all tensors to be on the same device"),
        (lambda: there @ torch.ones(3, device="pool"), RuntimeError, "inconsistent tensor size"),
    ):
        with pytest.raises(kind, match=words):
            action()


@on_device
def test_a_module_moves_with_its_tied_weights_and_back():
    import copy

    from torch import nn

    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameter = model[0].weight
    model.to("pool")
    assert model[0].weight is model[1].weight is parameter
    assert isinstance(model[0].weight, nn.Parameter)
    assert type(model[0].weight.data) is torch.Tensor
    twin = copy.deepcopy(model)
    assert twin[0].weight is twin[1].weight
    assert twin[0].weight is not model[0].weight
    model.load_state_dict(before)
    for name, value in model.cpu().state_dict().items():
        assert torch.equal(value, before[name])


@on_device
def test_saved_tensors_load_to_either_side():
    import io

    there = {"a": torch.arange(4.0, device="pool"), "b": torch.ones(2, 2, device="pool").t()}
    file = io.BytesIO()
    torch.save(there, file)
    for location in ("pool", "cpu"):
        file.seek(0)
        loaded = torch.load(file, map_location=location, weights_only=True)
        assert loaded["a"].device.type == location
        assert loaded["a"].tolist() == [0, 1, 2, 3]


@on_device
def test_gradients_are_those_of_the_host():
    from torch.utils.checkpoint import checkpoint

    def work(x, w):
        hidden = torch.tanh(x @ w)
        hidden = checkpoint(lambda h: (h * h).sin(), hidden, use_reentrant=False)
        return torch.nn.functional.layer_norm(hidden, hidden.shape[-1:]).pow(3).sum()

    torch.manual_seed(0)
    x, w = torch.randn(5, 4), torch.randn(4, 3)
    results = []
    for device in ("cpu", "pool"):
        a = x.to(device).requires_grad_()
        b = w.to(device).requires_grad_()
        seen = []
        b.register_hook(lambda grad, seen=seen: seen.append(grad.device.type))
        first = torch.autograd.grad(work(a, b), (a, b), create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), (a, b))
        assert seen
        assert set(seen) == {device}
        results.append([t.detach().cpu() for t in (*first, *second)])
    for host, pooled in zip(*results, strict=True):
        torch.testing.assert_close(pooled, host)


@on_device
def test_an_own_autograd_function_runs_on_the_device():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * 2 + 0 * x

    x = torch.ones(3, device="pool", requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
    per_sample = torch.func.vmap(torch.func.grad(lambda t: (t**2).sum()))(torch.arange(3.0, device="pool"))
    assert per_sample.tolist() == [0, 2, 4]


@on_device
def test_the_same_seed_gives_the_numbers_of_the_host():
    for draw in (
        lambda device: torch.randn(100, device=device),
        lambda device: torch.rand(3, 4, device=device),
        lambda device: torch.randint(10, (20,), device=device),
        lambda device: torch.randperm(17, device=device),
        lambda device: torch.empty(50, device=device).uniform_(-2, 3),
        lambda device: torch.nn.functional.dropout(torch.ones(200, device=device), 0.3),
        lambda device: torch.bernoulli(torch.full((40,), 0.4, device=device)),
        lambda device: torch.multinomial(torch.ones(9, device=device), 4),
    ):
        torch.manual_seed(11)
        host = draw("cpu")
        torch.manual_seed(11)
        assert torch.equal(draw("pool").cpu(), host)


@on_device
def test_an_op_that_takes_its_generator_by_position_draws_from_it():
    generator = torch.Generator("pool")
    host = torch.Generator()
    counts, odds = torch.full((9,), 20.0), torch.full((9,), 0.4)
    for draw in (
        lambda c, p, g: torch.binomial(c, p, generator=g),
        lambda c, p, g: torch._standard_gamma(p, generator=g),
    ):
        drawn = draw(counts.to("pool"), odds.to("pool"), generator.manual_seed(5))
        assert torch.equal(drawn.cpu(), draw(counts, odds, host.manual_seed(5)))


@on_device
def test_the_state_of_the_generator_can_be_kept_and_set_back():
    torch.manual_seed(3)
    state = torch.pool.get_rng_state()
    first = torch.randn(5, device="pool")
    torch.pool.set_rng_state(state)
    assert torch.equal(torch.randn(5, device="pool"), first)


@on_device
def test_an_output_that_is_too_small_is_resized():
    a, b = torch.ones(3, 2, device="pool"), torch.ones(2, 4, device="pool")
    out = torch.empty(0, device="pool")
    assert torch.mm(a, b, out=out) is out
    assert out.shape == (3, 4)
    assert out.sum().item() == 24
    kept = torch.arange(3.0, device="pool")
    kept.resize_(5)
    assert kept.shape == (5,)
    assert kept[:3].tolist() == [0, 1, 2]


@on_device
def test_a_late_error_names_the_op_its_operands_and_the_line():
    weights, ids = torch.ones(10, 3, device="pool"), torch.tensor([1, 99], device="pool")
    torch.pool.synchronize()
    rows = torch.nn.functional.embedding(ids, weights)  # the line at fault
    after = rows + 1
    with pytest.raises(IndexError) as raised:
        after.sum().item()
    text = str(raised.value)
    assert "index out of range" in text
    assert "aten::embedding(float32[10, 3], int64[2]" in text
    assert "test_a_late_error_names_the_op_its_operands_and_the_line.py:4, in test_a_late_error" in text
    assert weights.sum().item() == 30  # the session goes on


@on_device
def test_out_of_memory_is_pytorchs_error_and_the_program_can_go_on():
    torch.pool.empty_cache()
    _, total = torch.pool.mem_get_info()
    assert total == 1024**3
    too_much = torch.empty(total // 4 + 1, device="pool")
    with pytest.raises(torch.OutOfMemoryError) as raised:
        torch.pool.synchronize()
    text = str(raised.value)
    assert "out of memory. Tried to allocate 1024.00 MiB" in text
    assert "aten::empty" in text
    del too_much
    again = torch.ones(1000, device="pool")
    assert again.sum().item() == 1000


@on_device
def test_what_a_program_let_go_of_is_free_for_its_next_op():
    torch.pool.synchronize()
    before = torch.pool.memory_allocated()
    torch.pool.reset_peak_memory_stats()
    x = torch.ones(2**24, device="pool")  # 64 MiB; twenty of them do not fit
    for _ in range(20):
        x = x * 1.0
    assert x[-1].item() == 1
    assert torch.pool.max_memory_allocated() - before <= 3 * 64 * 2**20


@on_device
def test_memory_is_given_back_when_the_last_view_goes():
    torch.pool.synchronize()
    before = torch.pool.memory_allocated()
    big = torch.ones(2**20, device="pool")
    view = big[10:20]
    del big
    assert torch.pool.memory_allocated() - before == 4 * 2**20
    assert view.sum().item() == 10
    del view
    assert torch.pool.memory_allocated() == before


@on_device
def test_a_loop_leaves_memory_as_it_was():
    import gc

    from torch import nn

    def loop(steps):
        for _ in range(steps):
            model = nn.Linear(8, 8).to("pool")
            model(torch.ones(2, 8, device="pool")).sum().backward()
        gc.collect()
        return torch.pool.memory_allocated()

    assert loop(3) == loop(50)


@on_device
def test_several_threads_compute_at_once():
    from concurrent.futures import ThreadPoolExecutor

    def work(seed):
        x = torch.full((16, 16), float(seed), device="pool", requires_grad=True)
        for _ in range(20):
            (x * 2).sum().backward()
        return x.grad.mean().item()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(8))) == [40.0] * 8


@on_device
def test_a_forked_child_is_told_to_spawn():
    import os

    there = torch.ones(3, device="pool")
    there.sum().item()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            there.sum().item()
        except BaseException as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"'spawn' method" in os.read(reading, 4096)
    os.close(reading)
    os.close(writing)
    assert there.sum().item() == 3  # the parent is untouched


@on_device
def test_a_data_loader_with_forked_workers_feeds_the_device():
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(torch.arange(12.0)), batch_size=4, num_workers=1, multiprocessing_context="fork")
    assert sum(batch.to("pool").sum().item() for (batch,) in loader) == 66


@on_device
def test_ctrl_c_while_waiting_leaves_a_device_that_works():
    import os
    import signal
    import threading

    def read_for_ever():
        there = torch.ones(300, 300, device="pool")
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            (there @ there).sum().item()

    with pytest.raises(KeyboardInterrupt):
        read_for_ever()
    assert torch.arange(5, device="pool").sum().item() == 10


@on_device
def test_zeros_of_autograd_exist():
    x = torch.randn(3, device="pool", requires_grad=True)
    (grad,) = torch.autograd.grad(torch.sgn(x).sum(), x)
    assert grad.tolist() == [0, 0, 0]


@on_device
def test_a_copy_to_the_host_fills_the_tensor_that_is_there():
    import resource

    there = torch.arange(20 * 2**20, dtype=torch.float32).to("pool")  # 80 MiB: more than a frame
    host = torch.zeros(20 * 2**20)
    address, before = host.data_ptr(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    host.copy_(there)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 10_000  # 20,480 pages for a second tensor
    assert host.data_ptr() == address
    assert torch.equal(host, torch.arange(20 * 2**20, dtype=torch.float32))
    parameter = torch.nn.Parameter(torch.zeros(3))
    with torch.no_grad():
        parameter.copy_(torch.ones(3, device="pool"))
    assert parameter.tolist() == [1, 1, 1]
    strided, other = torch.zeros(3, 2).t(), torch.zeros(2, 3, dtype=torch.float64)
    values = torch.arange(6.0, device="pool").reshape(2, 3)
    for target in (
        strided,
        other,
        torch.zeros(4, 2, 3)[1:3].select(0, 1),
        torch.zeros(2, 3, dtype=torch.complex64).conj(),
    ):
        target.copy_(values)
        assert torch.equal(target.real.double(), values.cpu().double())


@on_device
def test_a_copy_that_need_not_block_is_complete_all_the_same():
    there = torch.arange(5.0, device="pool")
    assert there.to("cpu", non_blocking=True).tolist() == [0, 1, 2, 3, 4]
    assert torch.arange(3.0).to("pool", torch.float64, non_blocking=True).tolist() == [0, 1, 2]


@on_device
def test_recurrent_networks_compute_and_learn_as_on_the_host():
    from torch import nn

    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        torch.manual_seed(0)
        model, x = kind(3, 4, batch_first=True, bidirectional=True), torch.randn(2, 5, 3)
        results = []
        for device in ("cpu", "pool"):
            model.to(device)
            model.zero_grad()
            out = model(x.to(device))[0]
            out.pow(2).sum().backward()
            results.append([out.detach().cpu(), *(p.grad.clone().cpu() for p in model.parameters())])
        for host, pooled in zip(*results, strict=True):
            torch.testing.assert_close(pooled, host)


@on_device
def test_batch_norm_keeps_its_statistics_on_the_device():
    from torch import nn

    torch.manual_seed(0)
    x, results = torch.randn(4, 3, 5, 5), []
    for device in ("cpu", "pool"):
        norm, x_there = nn.BatchNorm2d(3).to(device), x.clone().to(device).requires_grad_()
        norm(x_there).pow(3).sum().backward()
        norm.eval()
        results.append([norm.running_mean.cpu(), norm.running_var.cpu(), x_there.grad.cpu(), norm(x_there).cpu()])
    for host, pooled in zip(*results, strict=True):
        torch.testing.assert_close(pooled, host)


@on_device
def test_pinned_batches_reach_the_device():
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4, pin_memory=True)
    for (batch,) in loader:
        assert batch.is_pinned()
        assert batch.to("pool", non_blocking=True).sum().item() in (6, 22)
    assert not torch.ones(2).is_pinned()


@on_device
def test_the_device_module_has_what_programs_ask_that_of_any_device_for():
    from torch.pool.amp import autocast
    from torch.pool.random import get_rng_state_all

    module = torch.get_device_module(torch.ones(1, device="pool").device)
    assert module is torch.get_device_module() is torch.pool
    assert module.__name__ == "torch.pool"
    module.init()
    weight = torch.ones(4, 4, device="pool", requires_grad=True)
    scaler, optimizer = module.amp.GradScaler(init_scale=8.0), torch.optim.SGD([weight], lr=0.25)
    assert isinstance(scaler, torch.amp.GradScaler)
    with autocast(dtype=torch.bfloat16):
        product = weight @ weight
    assert product.dtype is torch.bfloat16
    scaler.scale(product.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight.detach().cpu(), torch.ones(4, 4) - 0.25 * 8)

    class Double(torch.autograd.Function):
        @staticmethod
        @module.amp.custom_fwd(cast_inputs=torch.float32)
        def forward(ctx, x):
            assert x.dtype is torch.float32
            return x * 2

        @staticmethod
        @module.amp.custom_bwd
        def backward(ctx, gradient):
            return gradient * 2

    weight.grad = None
    with module.amp.autocast():
        Double.apply(weight.half()).sum().backward()
    assert weight.grad.sum().item() == 32

    module.random.manual_seed_all(3)
    states = get_rng_state_all()
    drawn = torch.rand(3, device="pool").cpu()
    module.random.set_rng_state_all(states)
    assert torch.equal(torch.rand(3, device="pool").cpu(), drawn)

    before = module.memory.memory_allocated()
    held = torch.zeros(1000, device="pool")
    assert module.memory.memory_allocated() - before == 4000 == held.nbytes
    nested = module.memory.memory_stats_as_nested_dict()
    assert nested["allocated_bytes"]["all"]["current"] == module.memory_stats()["allocated_bytes.all.current"]
    module.memory.empty_cache()
    assert isinstance(module.current_stream(), module.streams.Stream)
    assert module.exchange_device(0) == 0


@on_device
def test_tensors_can_be_pickled_and_storages_made():
    import pickle

    there = torch.arange(6.0, device="pool").reshape(2, 3)
    again = pickle.loads(pickle.dumps(there))
    assert again.device == there.device
    assert torch.equal(again, there)
    assert torch.UntypedStorage(12, device="pool").nbytes() == 12
    torch.accelerator.synchronize()


@on_device
def test_the_device_can_be_the_default():
    with torch.device("pool"):
        tensors = [torch.zeros(2), torch.tensor([1.0]), torch.arange(3), torch.randn(2), torch.nn.Linear(2, 2).weight]
    assert {str(tensor.device) for tensor in tensors} == {"pool:0"}


@on_device
def test_ctrl_c_at_any_moment_costs_nothing_but_the_call():
    import os
    import random
    import signal
    import threading

    there = torch.arange(100.0, device="pool")

    def work_until_interrupted():
        big = torch.ones(60_000)
        threading.Timer(random.uniform(0.0005, 0.02), os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            assert (there * 2).sum().item() == 9900
            assert big.to("pool").sum().item() == 60_000
            (there + 1).cpu()

    for _ in range(40):
        with pytest.raises(KeyboardInterrupt):
            work_until_interrupted()
    assert there.tolist() == list(range(100))


@on_device
def test_an_output_in_the_hosts_memory_is_refused():
    a = torch.ones(3, device="pool")
    with pytest.raises(RuntimeError, match="Expected out tensor to have device pool:0, but got cpu"):
        torch.add(a, a, out=torch.tensor(0.0))


@on_device
def test_an_output_takes_the_shape_that_only_the_worker_knows():
    x = torch.tensor([0.0, 1.0, 2.0], device="pool")
    places = torch.empty(0, dtype=torch.int64, device="pool")
    assert torch.nonzero(x, out=places) is places
    assert places.tolist() == [[1], [2]]
    chosen = torch.empty(5, device="pool")[::2][:2]  # of the right shape: it stays the view that it is
    strides = chosen.stride()
    torch.masked_select(x, x > 0, out=chosen)
    assert chosen.tolist() == [1.0, 2.0]
    assert chosen.stride() == strides


@on_device
def test_checkpointing_draws_the_same_numbers_again():
    from torch import nn
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).to("pool")
    x = torch.ones(4, 8, device="pool", requires_grad=True)
    gradients = []
    for run in (
        model,
        lambda x: checkpoint(model, x, use_reentrant=False),
        lambda x: checkpoint(model, x, use_reentrant=True),
    ):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(run(x).sum(), x)[0].tolist() if run is model else None)
        if run is not model:
            x.grad = None
            torch.manual_seed(1)
            run(x).sum().backward()
            gradients[-1] = x.grad.tolist()
    assert gradients[1] == gradients[2] == gradients[0]


@on_device
def test_a_parameter_that_moves_stays_the_object_that_it_was():
    import weakref

    from torch import nn

    class Marked(nn.Parameter):
        pass

    model, seen = nn.Linear(3, 3), []
    model.own = Marked(torch.ones(2))
    weight = model.weight
    weight.mark = "kept"
    weight.register_hook(lambda gradient: seen.append("hook"))
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("after"))
    watch = weakref.ref(weight)  # as a compiled model holds
    held = model(torch.ones(1, 3))  # a graph that refers to it
    model.to("pool")
    assert model.weight is weight is watch()
    assert weight.mark == "kept"
    assert type(model.own) is Marked
    model(torch.ones(2, 3, device="pool")).sum().backward()
    assert seen == ["hook", "after"]
    del held


@on_device
def test_the_data_of_a_parameter_can_be_set_across_devices():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.sum().backward()
    parameter.data = parameter.data.to("pool")
    assert parameter.device == parameter.grad.device == torch.device("pool:0")
    parameter.square().sum().backward()
    assert parameter.grad.tolist() == [3, 3]
    parameter.data = parameter.data.cpu()
    assert str(parameter.device) == str(parameter.grad.device) == "cpu"


@on_device
def test_sequences_of_different_lengths_are_packed_on_the_device():
    from torch import nn
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    torch.manual_seed(0)
    model, x, results = nn.LSTM(3, 4, bidirectional=True, batch_first=True), torch.randn(3, 5, 3), []
    for device in ("cpu", "pool"):
        model.to(device).zero_grad()
        packed = pack_padded_sequence(x.to(device), torch.tensor([5, 2, 3]), batch_first=True, enforce_sorted=False)
        out, lengths = pad_packed_sequence(model(packed)[0], batch_first=True)
        out.square().sum().backward()
        results.append([out.detach().cpu(), lengths, *(p.grad.clone().cpu() for p in model.parameters())])
    for host, pooled in zip(*results, strict=True):
        torch.testing.assert_close(pooled, host)


@on_device
def test_a_transformer_encoder_takes_a_padding_mask():
    import warnings

    from torch import nn

    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, mask = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the host PyTorch makes nested tensors, and says that they are new
        host = model(x, src_key_padding_mask=mask)
        pooled = model.to("pool")(x.to("pool"), src_key_padding_mask=mask.to("pool")).cpu()
    torch.testing.assert_close(pooled[~mask], host[~mask])


@on_device
def test_the_accelerator_tells_of_memory_streams_and_events():
    before = torch.accelerator.memory_allocated()
    held = torch.ones(1024, device="pool")
    assert torch.accelerator.memory_allocated() - before == 4096
    assert torch.accelerator.max_memory_allocated() >= before + 4096
    assert torch.accelerator.get_memory_info()[1] == torch.pool.mem_get_info()[1]
    torch.accelerator.empty_cache()
    start, end = (torch.Event(device="pool", enable_timing=True) for _ in range(2))
    start.record()
    with torch.Stream(device="pool") as stream:
        held += 1
    end.record()
    torch.accelerator.current_stream().wait_stream(stream)
    held.record_stream(stream)
    assert start.elapsed_time(end) >= 0
    assert isinstance(stream, torch.Stream)
    assert isinstance(end, torch.Event)
    assert held.sum().item() == 2048


@on_device
def test_what_backward_needs_can_be_kept_on_the_host():
    x = torch.ones(3, device="pool", requires_grad=True)
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        y = x.exp()
    y.sum().backward()
    assert torch.equal(x.grad, y)


@on_device
def test_a_compiler_of_cuda_code_says_at_once_that_the_device_is_elsewhere():
    from torch.utils import cpp_extension

    for build in (
        lambda: cpp_extension.load("name", ["kernel.cu"]),
        lambda: cpp_extension.load_inline("name", "", cuda_sources="__global__ void f() {}"),
        lambda: cpp_extension.CUDAExtension("name", ["kernel.cu"]),
    ):
        with pytest.raises(RuntimeError, match="the CUDA extension 'name' needs a GPU"):
            build()


@on_device
def test_kernels_that_are_on_no_workers_list_are_made_of_others():
    from torch import nn
    from torch.nn.utils import parametrizations

    here = parametrizations.weight_norm(nn.Linear(4, 3))
    there = parametrizations.weight_norm(nn.Linear(4, 3)).to("pool")
    there.load_state_dict(here.state_dict())
    x = torch.randn(2, 4)
    for module, device in ((here, "cpu"), (there, "pool")):
        module(x.to(device)).pow(2).sum().backward()
    torch.testing.assert_close(there(x.to("pool")).cpu(), here(x))
    for mine, theirs in zip(there.parameters(), here.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.cpu(), theirs.grad)

    x, weight, bias = torch.randn(7, 2, 4), torch.randn(3, 4, 5), torch.randn(5)
    over_there = torch.conv_tbc(x.to("pool"), weight.to("pool"), bias.to("pool"), 1)
    torch.testing.assert_close(over_there.cpu(), torch.conv_tbc(x, weight, bias, 1))


@on_device
def test_what_a_hook_raises_during_backward_reaches_the_program_which_can_go_on():
    import sys

    from torch import nn

    def refuse(*_):
        error = KeyError("found something")
        sys._clear_type_cache()  # what is looked up while the error passes must not rely on it
        raise error

    def passes():
        x = torch.ones(3, device="pool", requires_grad=True)
        doubled = x * 2
        doubled.register_hook(refuse)
        yield doubled.sum().backward
        late = torch.ones(3, device="pool", requires_grad=True)
        late.register_post_accumulate_grad_hook(refuse)
        yield (late * 2).sum().backward
        node = x * 2
        node.grad_fn.register_hook(refuse)
        yield lambda: torch.autograd.grad(node.sum(), x)
        module = nn.Linear(3, 3).to("pool")
        module.register_full_backward_hook(refuse)
        yield module(x).sum().backward

    for backward in passes():
        with pytest.raises(KeyError, match="found something"):
            backward()
    x = torch.ones(3, device="pool", requires_grad=True)
    (x * 3).sum().backward()
    assert x.grad.tolist() == [3, 3, 3]


@on_device
def test_a_model_that_leaves_the_device_before_its_backward_pass_is_told_so():
    from torch import nn

    model = nn.Linear(2, 2).to("pool")
    loss = model(torch.ones(1, 2, device="pool")).sum()
    model.cpu()
    with pytest.raises(RuntimeError, match="moved to another device between the forward and the backward pass"):
        loss.backward()


@on_device
def test_one_number_of_a_larger_tensor_crosses_whatever_its_stride_is():
    for x in (torch.arange(6.0).view(1, 6)[:, ::6], torch.arange(6.0)[::6], torch.ones(1).expand(1, 1, 1)):
        there = x.to("pool")
        assert torch.zeros_like(x).copy_(there).equal(x)
        assert there.cpu().equal(x)


@on_device
def test_linspace_between_numbers_on_the_device_is_where_it_is_asked_for():
    start = torch.tensor(1.0, device="pool")
    assert torch.equal(torch.linspace(start, 3, 3), torch.tensor([1.0, 2.0, 3.0]))
    there = torch.logspace(start, start + 2, 3, device="pool")
    assert there.is_pool
    assert torch.equal(there.cpu(), torch.tensor([10.0, 100.0, 1000.0]))


@on_device
def test_numbers_as_an_index_cost_no_round_trip():
    a, n = torch.arange(12.0, device="pool").reshape(3, 4), torch.tensor([2, 0], device="pool")
    session = torch.pool.session()
    waits = []
    requests = session.requests
    session.requests = lambda *args: waits.append(args) or requests(*args)
    try:
        row, numbers = a[n], a[n, 1]
    finally:
        session.requests = requests
    assert not waits
    assert torch.equal(row.cpu(), torch.tensor([[8.0, 9, 10, 11], [0, 1, 2, 3]]))
    assert numbers.tolist() == [9.0, 1.0]


@on_device
def test_a_mask_of_bytes_warns_as_everywhere():
    a, mask = torch.zeros(3, 2, device="pool"), torch.tensor([1, 0, 1], dtype=torch.uint8, device="pool")
    with pytest.warns(UserWarning, match=r"indexing with dtype torch\.uint8 is now deprecated") as warned:
        assert a[mask].shape == (2, 2)
    assert [warning.filename for warning in warned] == ["test_a_mask_of_bytes_warns_as_everywhere.py"]
    with pytest.warns(UserWarning, match="indexing with dtype"):
        a.index_put_((mask,), torch.ones((), device="pool"), accumulate=True)
    assert a.tolist() == [[1, 1], [0, 0], [1, 1]]


@on_device
def test_views_are_copied_into_outputs():
    a = torch.arange(6.0).reshape(2, 3)
    for name, *rest in (
        ("diagonal", 0),
        ("transpose", 0, 1),
        ("select", 1, 1),
        ("unsqueeze", 0),
        ("expand", (4, 2, 3)),
    ):
        copy = getattr(torch, f"{name}_copy")
        expected = copy(a, *rest)
        out = torch.empty(0, device="pool")
        assert copy(a.to("pool"), *rest, out=out) is out
        assert torch.equal(out.cpu(), expected), name
    assert torch.diag(a.to("pool"), out=torch.empty(0, device="pool")).tolist() == [0, 4]


@on_device
def test_a_lazily_negated_view_of_a_whole_is_negative_wherever_it_goes():
    x = torch.arange(1.0, 4.0, device="pool")
    negative = torch._neg_view(x)
    assert negative.tolist() == [-1, -2, -3]
    assert (negative * 2).tolist() == [-2, -4, -6]
    assert (x * 2).tolist() == [2, 4, 6]
    other = torch.zeros(3, device="pool")
    other.copy_(negative)
    assert other.tolist() == [-1, -2, -3]
    other._neg_view().copy_(x * 5)
    assert other.tolist() == [-5, -10, -15]


@on_device
def test_a_number_is_copied_into_a_tensor():
    x = torch.zeros(2, 3, device="pool")
    x[0].copy_(torch.inf)
    assert x.tolist() == [[torch.inf] * 3, [0] * 3]
