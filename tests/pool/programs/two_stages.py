"""A model in two stages, each on a device of its own: prints twenty losses."""

import sys

import torch

first, second = sys.argv[1:]


class TwoStages(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.LayerNorm(64)).to(first)
        self.two = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4)).to(second)

    def forward(self, batch):
        return self.two(self.one(batch.to(first)).to(second))


torch.manual_seed(1)
model = TwoStages()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
data = torch.randn(20, 32, 16)
labels = data[..., :4].argmax(-1)
for batch, label in zip(data, labels, strict=True):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(batch), label.to(second))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    print(loss.item())
