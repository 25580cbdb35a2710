"""Of the form of pytorch/examples' word_language_model: an LSTM whose state is carried over, clipping, steps."""

import sys
from pathlib import Path

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, kind, tokens=40, width=24):
        super().__init__()
        self.drop, self.encoder = nn.Dropout(0.2), nn.Embedding(tokens, width)
        self.rnn = getattr(nn, kind)(width, width, 2, dropout=0.2)
        self.decoder = nn.Linear(width, tokens)
        self.decoder.weight = self.encoder.weight

    def forward(self, ids, hidden):
        output, hidden = self.rnn(self.drop(self.encoder(ids)), hidden)
        decoded = self.decoder(self.drop(output))
        return nn.functional.log_softmax(decoded.view(-1, 40), dim=1), hidden

    def init_hidden(self, batch):
        weight = next(self.parameters())
        zeros = weight.new_zeros(2, batch, 24)
        return (zeros, weight.new_zeros(2, batch, 24)) if isinstance(self.rnn, nn.LSTM) else zeros


def detached(hidden):
    return hidden.detach() if isinstance(hidden, torch.Tensor) else tuple(detached(h) for h in hidden)


torch.set_num_threads(1)
device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
words = (torch.arange(900).square() % 40).view(9, -1).t().contiguous().to(device)
for kind in ("LSTM", "GRU"):
    torch.manual_seed(1)
    model = Model(kind).to(device)
    torch.manual_seed(2)
    hidden = model.init_hidden(9)
    for start in range(0, 80, 8):
        model.zero_grad()
        hidden = detached(hidden)
        output, hidden = model(words[start : start + 8], hidden)
        loss = nn.functional.nll_loss(output, words[start + 1 : start + 9].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        for parameter in model.parameters():
            parameter.data.add_(parameter.grad, alpha=-5)
        print("loss", loss.item())
    with Path(sys.argv[1]).open("wb") as file:
        torch.save(model, file)
    with Path(sys.argv[1]).open("rb") as file:
        model = torch.load(file, weights_only=False)
    model.rnn.flatten_parameters()
    model.eval()
    with torch.no_grad():
        output, _ = model(words[:8], model.init_hidden(9))
    print("test", output.exp().max(1)[0].sum().item())
