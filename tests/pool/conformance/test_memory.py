"""A long loop leaves memory flat on both sides."""

import pytest

PROGRAM = """
import gc, json, os
import psutil, torch

both = [psutil.Process(), psutil.Process(json.loads(os.environ["MILLPOND_POOL_WORKERS"])[0]["pid"])]

def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
    loss.item()
    gc.collect()
    torch.pool.synchronize()
    return torch.pool.memory_allocated(), [process.memory_info().rss for process in both]

torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).to("pool")
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
inputs = torch.randn(8, 16).to("pool")
used, before = train(2000)
for _ in range(2):
    again, after = train(5000)
    assert again == used
    assert all(now - then < 16 * 2**20 for now, then in zip(after, before)), (before, after)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_steps_leave_memory_as_it_was(worker):
    """About a minute on two cores."""
    done = worker.run(PROGRAM, timeout_s=590)
    assert done.returncode == 0, done.stderr
