"""Of the form of pytorch/examples' time_sequence_prediction: LSTM cells in double precision, trained by L-BFGS."""

import torch
from torch import nn


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm1, self.lstm2, self.linear = nn.LSTMCell(1, 11), nn.LSTMCell(11, 11), nn.Linear(11, 1)

    def forward(self, series, future=0):
        outputs = []
        state = [torch.zeros(series.size(0), 11, dtype=torch.double, device=series.device) for _ in range(4)]
        for value in series.split(1, dim=1):
            state[:2] = self.lstm1(value, tuple(state[:2]))
            state[2:] = self.lstm2(state[0], tuple(state[2:]))
            outputs.append(self.linear(state[2]))
        for _ in range(future):
            state[:2] = self.lstm1(outputs[-1], tuple(state[:2]))
            state[2:] = self.lstm2(state[0], tuple(state[2:]))
            outputs.append(self.linear(state[2]))
        return torch.cat(outputs, dim=1)


torch.set_num_threads(1)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
waves = torch.sin((torch.arange(12).view(1, -1) + torch.arange(0, 40, 8).view(-1, 1)) / 3.0).double().to(device)
model = Sequence().double().to(device)
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.8, max_iter=4)
for _ in range(3):

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(waves[:, :-1]), waves[:, 1:])
        print("loss", loss.item())
        loss.backward()
        return loss

    optimizer.step(closure)
with torch.no_grad():
    print("test", model(waves[:, :-1], future=4)[:, -1].detach().cpu().numpy().sum())
