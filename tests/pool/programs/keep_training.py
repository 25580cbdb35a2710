"""Trains for many steps, then makes and drops as many models; prints what memory each tenth took, on both sides.

    python keep_training.py STEPS

A line is: which loop, the step, bytes of this process, of the worker's process, and of the lease in use.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

PAGE = os.sysconf("SC_PAGE_SIZE")
(worker,) = json.loads(os.environ["MILLPOND_POOL_WORKERS"])


def resident(process):
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE


def show(loop, step):
    torch.cuda.synchronize()
    gc.collect()
    print(loop, step, resident(os.getpid()), resident(worker["pid"]), torch.cuda.memory_allocated(), flush=True)


def make():
    model = nn.Sequential(nn.Embedding(50, 16), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 16), nn.Linear(16, 5))
    model.to("cuda")
    return model, torch.optim.Adam(model.parameters())


def step(model, optimizer, number):
    ids = torch.randint(50, (4, 8)).to("cuda", non_blocking=True)
    loss = F.cross_entropy(model(ids), ids[:, 0] % 5)
    optimizer.zero_grad(set_to_none=number % 2 == 0)
    loss.backward()
    optimizer.step()
    return loss.item() if number % 10 == 0 else loss


torch.set_num_threads(1)
steps = int(sys.argv[1])
model, optimizer = make()
for number in range(steps):
    if number % (steps // 10) == 0:
        show("train", number)
    step(model, optimizer, number)
show("train", steps)
del model, optimizer
for number in range(steps):
    if number % (steps // 10) == 0:
        show("drop", number)
    for of_model in range(2):
        step(*make(), of_model)
show("drop", steps)
