"""A program that knows only `cuda` finds the pool device under that name. Each test runs in a process that has one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch


def on_cuda(function: Callable[[], None]) -> Callable[..., None]:
    """Run a test in the process that has the device; `torch` and `pytest` are there, all else it imports."""

    @functools.wraps(function)
    def test(cuda_process):
        cuda_process.call(function)

    del test.__wrapped__  # pytest would take the fixtures from it
    return test


def test_a_program_that_never_says_cuda_is_shown_the_pool(worker):
    done = worker.run(
        "import torch; x = torch.ones(2, device='pool'); torch.cuda.is_available(); torch.manual_seed(1)\n"
        "print(x.device, x.is_cuda, 'device' in vars(torch.Tensor), torch.accelerator.current_accelerator())\n"
        "y = x.cuda()\n"
        "print(y is x, x.device, x.is_cuda, torch.accelerator.current_accelerator(), torch.ones(1).device)"
    )
    assert done.stdout.splitlines() == ["pool:0 False False pool", "True cuda:0 True cuda cpu"], done.stderr


@on_cuda
def test_every_way_to_make_a_tensor_on_cuda_makes_one_on_the_pool():
    host = torch.ones(2)
    for made in (
        torch.empty(2, device="cuda"),
        torch.zeros(2, device="cuda:0"),
        torch.rand(2, device=torch.device("cuda")),
        torch.arange(2, device=torch.device("cuda", 0)),
        torch.full((2,), 1.0, device="cuda"),
        torch.eye(2, device="cuda"),
        torch.randperm(2, device="cuda"),
        torch.hann_window(2, device="cuda"),
        torch.tensor([1, 2], device="cuda"),
        torch.as_tensor([1, 2], device="cuda"),
        torch.asarray([1, 2], device="cuda"),
        torch.empty_strided((2,), (1,), device="cuda"),
        torch.zeros_like(host, device="cuda"),
        torch.rand_like(host, device="cuda"),
        host.new_zeros(2, device="cuda"),
        host.new_tensor([1, 2], device="cuda"),
        host.to("cuda"),
        host.to(device="cuda", dtype=torch.float16),
        host.to(torch.device("cuda:0"), non_blocking=True),
        host.to(0),
        host.cuda(),
        host.cuda(0, non_blocking=True),
        host.cuda("cuda:0"),
        host.pin_memory().cuda(),
        host.to(torch.empty(0, device="cuda")),
        host.type("torch.cuda.LongTensor"),
        host.type(torch.cuda.FloatTensor),
        torch.cuda.FloatTensor([1, 2]),
        torch.cuda.LongTensor(2, 3),
        torch.nn.Linear(2, 2, device="cuda").weight,
        torch.nn.Linear(2, 2).cuda().weight,
        torch.nn.Linear(2, 2).to("cuda").weight,
    ):
        assert made.device == torch.device("cuda:0")
        assert made.device.type == "cuda"
        assert made.is_cuda
        assert made.get_device() == 0
        assert made.to("cuda") is made.cuda() is made
        assert not made.cpu().is_cuda
        assert made.clone().device == made.device
    assert torch.zeros_like(host.cuda(), device="cpu").device == torch.device("cpu")
    assert isinstance(host.cuda(), torch.cuda.FloatTensor)
    assert host.cuda().type() == "torch.cuda.FloatTensor"
    assert repr(host.cuda()) == "tensor([1., 1.], device='cuda:0')"


@on_cuda
def test_a_legacy_type_of_cuda_can_be_the_default():
    import warnings

    try:
        for kind in ("torch.cuda.HalfTensor", torch.cuda.HalfTensor):
            torch.set_default_tensor_type(kind)
            assert (torch.zeros(2).dtype, torch.zeros(2).device) == (torch.float16, torch.device("cuda:0"))
            with warnings.catch_warnings(action="ignore"):  # that it is deprecated, once in a process
                torch.set_default_tensor_type(torch.FloatTensor)
            assert (torch.zeros(2).dtype, torch.zeros(2).device) == (torch.float32, torch.device("cpu"))
        with pytest.raises(TypeError, match="floating-point"):
            torch.set_default_tensor_type(torch.cuda.LongTensor)
    finally:
        torch.set_default_device(None)


@on_cuda
def test_cuda_is_the_default_device_when_a_program_says_so():
    with torch.device("cuda"):
        assert torch.ones(2).is_cuda
        assert torch.tensor(1.0).is_cuda
    torch.set_default_device("cuda")
    try:
        assert torch.get_default_device() == torch.device("cuda:0")
        assert torch.nn.Linear(2, 2)(torch.rand(3, 2)).is_cuda
        assert torch.equal(torch.ones(2).cpu(), torch.ones(2, device="cpu"))
    finally:
        torch.set_default_device(None)
    assert not torch.ones(2).is_cuda
    assert torch.accelerator.current_accelerator() == torch.device("cuda")


@on_cuda
def test_a_device_that_the_lease_lacks_is_refused_by_its_name():
    for make in (lambda: torch.ones(2, device="cuda:5"), lambda: torch.ones(2).cuda(5)):
        with pytest.raises(Exception, match=r"cuda:5 does not exist: lease lease-1 has 1 device"):
            make()
    with pytest.raises(RuntimeError, match="must be cuda device"):
        torch.ones(2).cuda("cpu")


@on_cuda
def test_the_functions_of_torch_cuda_tell_of_the_lease():
    assert torch.cuda.is_available()
    assert torch.backends.cuda.is_built()
    assert torch.cuda.device_count() == 1
    assert torch.cuda.get_device_name() == torch.cuda.get_device_properties("cuda:0").name == "CPU (2 cores)"
    assert not torch.pool.is_gpu()
    assert torch.cuda.get_device_capability() == (0, 0)  # a worker without a GPU
    assert torch.cuda.mem_get_info()[1] == torch.cuda.get_device_properties(0).total_memory == 2**30
    torch.cuda.set_device("cuda:0")
    with torch.cuda.device(0):
        assert torch.cuda.current_device() == 0
    before = torch.cuda.memory_allocated()
    big = torch.zeros(2**20, device="cuda")
    assert torch.cuda.memory_allocated() - before == 2**22
    assert torch.cuda.memory_reserved() == torch.cuda.memory_stats()["allocated_bytes.all.current"]
    del big
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() >= before + 2**22
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == before
    assert "in the lease" in torch.cuda.memory_summary()


@on_cuda
def test_random_numbers_repeat_under_a_seed_by_every_way_to_seed():
    draws = []
    for seed in (torch.manual_seed, torch.cuda.manual_seed, torch.cuda.manual_seed_all):
        seed(7)
        draws.append(torch.rand(4, device="cuda").cpu())
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
    state = torch.cuda.get_rng_state()
    after = torch.rand(4, device="cuda").cpu()
    torch.cuda.set_rng_state(state, "cuda:0")
    assert torch.equal(torch.rand(4, device="cuda").cpu(), after)
    torch.cuda.set_rng_state_all([state])
    assert torch.equal(torch.rand(4, device="cuda").cpu(), after)
    with torch.random.fork_rng():
        torch.rand(9, device="cuda")
    torch.cuda.set_rng_state_all(torch.cuda.get_rng_state_all())
    assert not torch.equal(torch.rand(4, device="cuda").cpu(), after)


@on_cuda
def test_a_generator_draws_by_itself_and_leaves_the_default_one_alone():
    generator = torch.Generator(device="cuda").manual_seed(3)
    assert isinstance(generator, torch.Generator)
    assert isinstance(torch.Generator(), torch.Generator)
    assert generator.device == torch.device("cuda:0")
    assert generator.initial_seed() == 3
    state = torch.cuda.get_rng_state()
    first = torch.randn(3, device="cuda", generator=generator)
    second = torch.empty(3, device="cuda").normal_(generator=generator)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    host = torch.Generator().manual_seed(3)
    assert torch.equal(first.cpu(), torch.randn(3, generator=host))  # the worker is a CPU: the same numbers
    assert torch.equal(second.cpu(), torch.empty(3).normal_(generator=host))
    kept = generator.get_state()
    drawn = torch.randperm(9, device="cuda", generator=generator)
    generator.set_state(kept)
    assert torch.equal(torch.randperm(9, device="cuda", generator=generator), drawn)
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.randn(3, device="cuda", generator=host)


@on_cuda
def test_events_measure_what_the_worker_took():
    import time

    x = torch.rand(400, 400, device="cuda") / 400
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began = time.perf_counter()
    start.record()
    for _ in range(20):
        x = x @ x
    end.record()
    torch.cuda.synchronize()
    assert 0 < start.elapsed_time(end) <= (time.perf_counter() - began) * 1000
    assert end.query()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = x + 1
    torch.cuda.current_stream().wait_stream(stream)
    stream.record_event().synchronize()
    assert torch.equal(y, x + 1)
    with pytest.raises(ValueError, match="enable_timing=True"):
        torch.cuda.Event().elapsed_time(end)


@on_cuda
def test_autocast_follows_the_rules_of_cuda():
    from torch.nn import functional as F

    x, w = torch.rand(4, 4, device="cuda"), torch.rand(4, 4, device="cuda", requires_grad=True)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            assert torch.is_autocast_enabled()
            assert torch.is_autocast_enabled("cuda")
            assert torch.get_autocast_dtype("cuda") is torch.get_autocast_gpu_dtype() is dtype
            assert (x @ w).dtype is F.linear(x, w).dtype is dtype
            assert (x @ w).softmax(-1).dtype is (x @ w).exp().dtype is (x @ w).sum().dtype is torch.float32
            assert F.layer_norm(x @ w, (4,)).dtype is F.mse_loss(x @ w, x).dtype is torch.float32
            assert torch.addcmul(x, x @ w, x @ w).dtype is torch.float32
            assert ((x @ w) + (x @ w)).dtype is dtype
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32  # the host's is another matter
            with torch.autocast(device_type="cuda", enabled=False):
                assert (x @ w).dtype is torch.float32
            with pytest.raises(RuntimeError, match="unsafe to autocast"):
                F.binary_cross_entropy(x, x)
        assert not torch.is_autocast_enabled()
    with torch.autocast("cuda"):
        assert (x @ w).dtype is torch.float16
        ((x @ w) + (x @ w)).sum().backward()
    assert w.grad.dtype is torch.float32


@on_cuda
def test_a_scaler_skips_the_steps_that_overflow():
    model = torch.nn.Linear(3, 3).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = model.weight.detach().clone()
    for step in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda"):
            loss = model(torch.ones(2, 3, device="cuda")).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        if step == 0:
            assert torch.equal(model.weight, before)
        scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert not torch.equal(model.weight, before)
    assert model.weight.isfinite().all()


@on_cuda
def test_checkpoints_go_to_a_file_and_come_back_to_any_device():
    import copy
    import io

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model.cuda()
    assert model[1].weight is model[0].weight
    assert copy.deepcopy(model)[1].weight.is_cuda
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    for where, expected in ((None, "cuda"), ("cuda", "cuda"), ("cuda:0", "cuda"), ("cpu", "cpu")):
        file.seek(0)
        loaded = torch.load(file, map_location=where)
        assert {tensor.device.type for tensor in loaded.values()} == {expected}
        assert torch.equal(loaded["0.weight"].cpu(), model[0].weight.cpu())
    file.seek(0)
    assert b"cuda:0" in file.read()  # it opens on a machine with a GPU as well
    host = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    host.load_state_dict(model.state_dict())
    assert torch.equal(host[1].weight, model[1].weight.cpu())


@on_cuda
def test_what_needs_the_cuda_runtime_here_says_so_at_once():
    there = torch.ones(2, device="cuda")
    assert torch.cuda.CUDAGraph | None  # named in annotations
    for action in (
        torch.cuda.CUDAGraph,
        torch.cuda.cudart,
        torch.cuda.utilization,
        torch.cuda.current_blas_handle,
        lambda: torch.cuda.Event(interprocess=True),
        lambda: there.__cuda_array_interface__,
        lambda: there.__dlpack__(),
        lambda: torch.utils.dlpack.to_dlpack(there),
        lambda: torch.from_dlpack(there),
        lambda: torch.multiprocessing.reductions.reduce_tensor(there),
    ):
        with pytest.raises(RuntimeError, match="at a worker"):
            action()
    with pytest.raises(TypeError, match=r"can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu"):
        there.numpy()


@on_cuda
def test_streams_of_no_certain_device_are_the_pools():
    stream = torch.Stream("cuda")
    assert stream.device == torch.device("cuda:0")
    batch = torch.ones(2, device="cuda")
    batch.record_stream(torch.cuda.current_stream())
    assert not torch.accelerator.current_stream().is_capturing()
    assert torch.cuda.get_device_properties(0).multi_processor_count > 0


@on_cuda
def test_a_profiler_of_cuda_sees_this_process():
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        (torch.ones(2, device="cuda") * 2).sum().item()
    assert "aten::mul" in profiler.key_averages().table()


@on_cuda
def test_a_scripted_model_loads_onto_the_device():
    import io
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), file)
        file.seek(0)
        assert torch.jit.load(file, map_location="cuda")(torch.ones(1, 2, device="cuda")).is_cuda
