"""`torch.compile` on the pool: the same numbers, one message for a graph, and op by op where that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker_site import WorkerProcess

pytestmark = pytest.mark.slow  # each starts a process that imports PyTorch's compiler

PROGRAM = Path(__file__).parent / "compile_models.py"


def losses(device: str, how: str, environment: dict[str, str] | None = None) -> dict[str, list[float]]:
    command = [sys.executable, str(PROGRAM), device, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert "op by op" not in done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def local_losses() -> dict[str, list[float]]:
    return losses("cpu", "eager")


@pytest.mark.parametrize(("device", "how"), [("pool", "eager"), ("pool", "step"), ("cuda", "step"), ("pool", "model")])
def test_a_compiled_program_learns_what_it_learns_on_the_host(worker, local_losses, device, how):
    pooled = losses(device, how, worker.environment())

    assert pooled.keys() == local_losses.keys()
    for model, expected in local_losses.items():
        assert len(expected) == 50
        assert pooled[model] == pytest.approx(expected, abs=1e-5), model


def run(worker: WorkerProcess, program: str) -> str:
    """Run a program on the device, with what the session issues counted in `counts`; return what it logged."""
    done = worker.run(COUNTING + program, timeout_s=100)
    assert done.returncode == 0, done.stderr
    return done.stderr


COUNTING = """
import collections
import torch
from millpond.pool import wire
torch.set_num_threads(1)
session = torch.pool.session()
counts = collections.Counter()
issue = session.issue
def counted(item, what=""):
    counts[type(item).__name__] += 1
    issue(item, what)
session.issue = counted
def items(function, *arguments):
    counts.clear()
    result = function(*arguments)
    return dict(counts), result
"""


def test_a_compiled_function_costs_one_message_and_follows_shapes_numbers_and_writes(worker):
    run(
        worker,
        """
factor = 2.0

@torch.compile
def function(x, running):
    running.mul_(0.5).add_(x.mean())
    y = (x * factor).relu() + running
    return y, y[0], x.t(), None, 3

def expected(x, running):
    running = running * 0.5 + x.mean()
    y = (x * factor).relu() + running
    return running, y, y[0], x.t()

def check(x):
    running = torch.ones(1)
    there = running.to("pool")
    seen = x.to("pool")
    seen_items, got = items(function, seen, there)
    for g, e in zip((there, *got[:3]), expected(x, running), strict=True):
        assert torch.allclose(g.cpu(), e), (g, e)
    assert got[3:] == (None, 3)
    assert got[1].untyped_storage().data_ptr() == got[0].untyped_storage().data_ptr()
    assert got[2].untyped_storage().data_ptr() == seen.untyped_storage().data_ptr()
    assert not got[1].requires_grad
    return seen_items

x = torch.randn(3, 4)
assert check(x)["DefineGraph"] == 1
assert check(x + 1) == {"Run": 1}
check(torch.randn(5, 4))
assert check(torch.randn(5, 4)) == {"Run": 1}
check(torch.randn(3, 4))
assert check(torch.randn(3, 4)) == {"Run": 1}
factor = 3.0
check(x)
assert check(x) == {"Run": 1}
assert check(torch.randn(4, 3).t()).get("Run", 0) <= 1  # other strides are another kind of input
""",
    )


def test_dropout_under_compile_draws_as_the_host_does_and_repeats_under_a_seed(worker):
    run(
        worker,
        """
x = torch.ones(64, 64)
here = []
torch.manual_seed(5)
for _ in range(4):
    here.append(torch.nn.functional.dropout(x, 0.5))
there = x.to("pool")
function = torch.compile(lambda x: torch.nn.functional.dropout(x, 0.5))
for _ in range(2):
    torch.manual_seed(5)
    for expected in here:
        assert torch.equal(function(there).cpu(), expected)
""",
    )


def test_the_learning_rate_and_the_gradients_of_a_compiled_step_are_those_of_now(worker):
    run(
        worker,
        """
def train(device, compiled):
    weight = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    def step(x):
        (weight * x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    step = torch.compile(step) if compiled else step
    for number in range(9):
        optimizer.param_groups[0]["lr"] = 1.0 / (1 + number // 3)
        step(torch.full((3,), number + 1.0).to(device))
    return weight.detach().cpu()

assert torch.allclose(train("pool", True), train("cpu", False))
""",
    )


def test_what_cannot_be_captured_runs_op_by_op_and_the_log_says_why(worker):
    log = run(
        worker,
        """
@torch.compile
def mixed(x, scale):
    return x * scale

@torch.compile
def uploading(x, host):
    return x + (host * 2).to("pool")

x, scale = torch.arange(3.0), torch.tensor(2.0)
for _ in range(3):
    assert torch.equal(mixed(x.to("pool"), scale).cpu(), x * scale)
    scale += 1
assert torch.equal(uploading(x.to("pool"), x).cpu(), x * 3)
counted, result = items(uploading, x.to("pool"), x + 1)
assert torch.equal(result.cpu(), x * 3 + 2)
assert counted["Run"] == 1  # what the host does is done anew, what the device does is captured
print("done")
""",
    )
    lines = [line for line in log.splitlines() if "op by op" in line]
    assert len(lines) == 1
    assert "takes tensors of the host and of the device" in lines[0]


def test_what_pytorch_cannot_trace_runs_op_by_op(worker):
    log = run(
        worker,
        """
torch.manual_seed(1)
pooling = torch.nn.FractionalMaxPool3d(2, output_size=2, _random_samples=torch.rand(1, 2, 3).to("pool"))
x = torch.randn(1, 2, 5, 5, 5).to("pool").requires_grad_()
results = []
for function in (pooling, torch.compile(pooling)):
    result = function(x)
    results += [result.cpu(), *(g.cpu() for g in torch.autograd.grad(result.sum(), x))]
assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
torch.compiler.reset()
""",
    )
    assert sum("op by op" in line for line in log.splitlines()) == 1


def test_a_model_with_batch_norm_is_captured_in_training_and_evaluation(worker):
    run(
        worker,
        """
answers = []
for device in ("cpu", "pool"):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).to(device)
    function = torch.compile(model) if device == "pool" else model
    for training in (True, True, True, False, False, False):
        model.train(training)
        x = torch.randn(2, 3, 6, 6).to(device)
        counted, result = items(lambda x: function(x).mean(), x) if device == "pool" else ({}, function(x).mean())
        result.backward()
        answers.append((result.item(), model[1].running_mean.cpu().clone(), model[0].weight.grad.cpu().clone()))
        if device == "pool" and (len(answers) - 1) % 3 == 2:
            assert counted["Run"] >= 1 and counted["Call"] < 5, counted
half = len(answers) // 2
torch.testing.assert_close(answers[half:], answers[:half])
""",
    )


def test_a_number_that_changes_is_taken_into_the_graph(worker):
    log = run(
        worker,
        """
function = torch.compile(lambda x, slope: torch.nn.functional.elu(x, slope))
x = torch.linspace(-1, 1, 5)
for slope in (0.1, 0.2, 0.3):
    result = function(x.to("pool").requires_grad_(), slope)
    torch.testing.assert_close(result.detach().cpu(), torch.nn.functional.elu(x, slope))
""",
    )
    assert "op by op" not in log


def test_many_shapes_are_recorded_only_so_often(worker):
    log = run(
        worker,
        """
from millpond.pool import capture
capture.MAX_RECORDINGS = 4
function = torch.compile(lambda x: x.sin() + 1, dynamic=True)
for size in range(2, 20):
    x = torch.randn(size)
    assert torch.allclose(function(x.to("pool")).cpu(), x.sin() + 1)
assert session.graphs == list(range(wire.MAX_GRAPHS - 4))
""",
    )
    assert sum("op by op" in line for line in log.splitlines()) == 1


def test_an_error_within_a_graph_names_the_op_and_the_line(worker):
    run(
        worker,
        """
table = torch.randn(4, 2, device="pool")
look_up = torch.compile(lambda ids: torch.nn.functional.embedding(ids, table) * 2)
good, bad = torch.tensor([1, 2]).to("pool"), torch.tensor([1, 9]).to("pool")
look_up(good), look_up(good)
try:
    look_up(bad).cpu()
except IndexError as error:
    assert "aten::embedding of a captured graph" in str(error), error
    assert "issued at" in str(error), error
else:
    raise SystemExit("no error")
assert look_up(good).shape == (2, 2)
""",
    )


def test_a_run_that_does_not_fit_changes_nothing_and_the_graph_runs_again_once_it_does(worker):
    run(
        worker,
        """
@torch.compile
def step(x, running):
    running.add_(1)
    y = torch.cat([x, x, x, x]) * 2
    return y.mean() + running

x, running = torch.ones(2**24).to("pool"), torch.zeros(1).to("pool")  # 64 MiB: a run needs 512
for _ in range(2):
    step(x, running).item()
assert items(step, x, running)[0] == {"Run": 1}
held = torch.empty(700 * 2**18, device="pool")
used = torch.pool.memory_allocated()
late = step(x, running)
try:
    late.item()
except torch.OutOfMemoryError as error:
    assert "Pool device out of memory. Tried to allocate 5" in str(error), error
    assert "issued at" in str(error), error
else:
    raise SystemExit("no error")
del late
assert running.item() == 3
assert torch.pool.memory_allocated() == used
assert (x[:9] * 2).sum().item() == 18
del held
seen, total = items(step, x, running)
assert seen == {"Run": 1}, seen
assert (total.item(), running.item()) == (6, 4)
assert torch.pool.memory_allocated() < 2**27
""",
    )


def test_memory_is_flat_over_many_captured_steps_and_models(worker):
    run(
        worker,
        """
import gc
def used():
    gc.collect()
    session.flush()
    return torch.pool.memory_allocated()
model = torch.nn.Linear(64, 64).to("pool")
optimizer = torch.optim.Adam(model.parameters())
@torch.compile
def step(x):
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
x = torch.randn(8, 64).to("pool")
for _ in range(5):
    step(x)
before = used()
for _ in range(300):
    loss = step(x)
assert used() - before <= loss.nbytes, (before, used())
""",
    )


@pytest.mark.skipif("MILLPOND_POOL_LEASE" in os.environ, reason="this process has a lease")
def test_a_process_without_a_lease_compiles_as_ever():
    program = "import torch; assert torch._TorchCompileInductorWrapper.__call__.__module__ == 'torch'"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_compiled_function_follows_the_default_dtype(worker):
    run(
        worker,
        """
@torch.compile
def scaled(x):
    return x * 0.1 + torch.ones(3, device=x.device)

x = torch.arange(3)
there = x.to("pool")
for default in (torch.float32, torch.float64, torch.float32, torch.float64):
    torch.set_default_dtype(default)
    for _ in range(3):
        result = scaled(there)
        assert torch.equal(result.cpu(), x * 0.1 + torch.ones(3)), default
assert items(scaled, there)[0] == {"Run": 1}
""",
    )


def test_what_is_compiled_runs_in_the_memory_layouts_that_it_was_traced_in(worker):
    run(
        worker,
        """
import copy
from millpond.pool import plan

torch.manual_seed(1)
net = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(4, 8), torch.nn.MaxPool2d(2), torch.nn.Conv2d(8, 4, 3),
    torch.nn.Flatten(), torch.nn.Linear(36, 2),
)

def gradients(device, compiled):
    model = copy.deepcopy(net).to(device).to(memory_format=torch.channels_last)
    answer = torch.compile(model) if compiled else model
    found = []
    for seed in range(3):
        x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed)).to(device)
        loss = answer(x.contiguous(memory_format=torch.channels_last)).square().mean()
        found += [gradient.cpu() for gradient in torch.autograd.grad(loss, list(model.parameters()))]
    return found

expected = gradients("cpu", False)
torch.testing.assert_close(gradients("pool", True), expected, rtol=1e-4, atol=1e-5)
# A device that lays its results out otherwise than was traced: here, what is traced is told another layout.
plan.ASK |= {"aten::convolution", "aten::max_pool2d_with_indices"}
torch._C._conv_determine_backend_memory_format = lambda *_: torch.contiguous_format
torch._dynamo.reset()
torch.pool.session().plans.clear()
torch.testing.assert_close(gradients("pool", True), expected, rtol=1e-4, atol=1e-5)
""",
    )
