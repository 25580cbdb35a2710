"""Trains an n-gram model and a Seq-CNN of the forms that `millpond learn` has, and prints the losses as JSON.

Run by tests, once on the host and once on the pool device: `python train_models.py DEVICE`.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, STEPS, BATCH = 1000, 50, 16


class Ngram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCABULARY, 2) * 0.1)
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight, padding_idx=0).sum(1) + self.bias


class SeqCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32, padding_idx=0)
        self.three = nn.Conv1d(32, 32, 3, padding=1)
        self.four = nn.Conv1d(32, 32, 4, padding=2)
        self.dropout = nn.Dropout(0.5)
        self.output = nn.Linear(64, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids).transpose(1, 2)
        pooled = [F.elu(convolution(x)).amax(2) for convolution in (self.three, self.four)]
        return self.output(self.dropout(torch.cat(pooled, 1)))


OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    "adam, one by one": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, foreach=False),
    "adam, fused": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=True),
    "adamw, foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
}


def train(model_class: type[nn.Module], optimizer_name: str, device: str) -> list[float]:
    torch.manual_seed(1)
    model = model_class().to(device)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    batches = torch.Generator().manual_seed(2)
    torch.manual_seed(3)  # dropout draws from here, on the host as at the worker
    losses = []
    for step in range(STEPS):
        ids = torch.randint(0, VOCABULARY, (BATCH, 40 + step % 4), generator=batches)
        labels = torch.randint(0, 2, (BATCH,), generator=batches)
        loss = F.cross_entropy(model(ids.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [loss.item() for loss in losses]


if __name__ == "__main__":
    torch.set_num_threads(1)
    device = sys.argv[1]
    runs = [(model, name) for model in (Ngram, SeqCnn) for name in OPTIMIZERS]
    print(json.dumps({f"{model.__name__}, {name}": train(model, name, device) for model, name in runs}))
