"""Trains models in all ways that `torch.compile` is used, and prints the losses as JSON.

Run by tests, on the host and on the pool device, compiled or not: `python compile_models.py DEVICE HOW`, where HOW is
`eager`, `step` (the whole step is compiled) or `model` (only the model is).
"""

from __future__ import annotations

import json
import sys

import torch
from torch import nn
from torch.nn import functional as F
from train_models import BATCH, STEPS, VOCABULARY, Ngram, SeqCnn


class Transformer(nn.Module):
    """Two layers with dropout and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(32, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.output(self.layers(self.embedding(ids)).mean(1))


def train(model_class: type[nn.Module], device: str, how: str) -> list[float]:
    torch.manual_seed(1)
    model = model_class().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    answer = torch.compile(model) if how == "model" else model

    def step(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(answer(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    if how == "step":
        step = torch.compile(step)
    batches = torch.Generator().manual_seed(2)
    torch.manual_seed(3)  # dropout draws from here, on the host as at the worker
    losses = []
    for number in range(STEPS):
        ids = torch.randint(1, VOCABULARY, (BATCH, 20 + number % 4), generator=batches)
        labels = torch.randint(0, 2, (BATCH,), generator=batches)
        losses.append(step(ids.to(device), labels.to(device)))
    return [loss.item() for loss in losses]


if __name__ == "__main__":
    torch.set_num_threads(1)
    _, device, how = sys.argv
    print(json.dumps({m.__name__: train(m, device, how) for m in (Ngram, SeqCnn, Transformer)}))
