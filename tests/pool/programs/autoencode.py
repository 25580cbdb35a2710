"""Of the form of pytorch/examples' vae: numbers drawn on the device in the middle of the forward pass, and samples."""

import torch
from torch import nn, optim
from torch.nn import functional as F


class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(64, 32), nn.Linear(32, 4), nn.Linear(32, 4)
        self.fc3, self.fc4 = nn.Linear(4, 32), nn.Linear(32, 64)

    def decode(self, z):
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))

    def forward(self, x):
        h = F.relu(self.fc1(x.view(-1, 64)))
        mu, logvar = self.fc21(h), self.fc22(h)
        std = torch.exp(0.5 * logvar)
        return self.decode(mu + torch.randn_like(std) * std), mu, logvar


torch.set_num_threads(1)
cuda = torch.cuda.is_available()
device = torch.device("cuda:0" if cuda else "cpu")
data = torch.rand(20, 16, 64, generator=torch.Generator().manual_seed(1)).round()
torch.manual_seed(1)
model = Vae()
if cuda:
    model.cuda()
optimizer = optim.Adam(model.parameters(), lr=1e-3)
torch.manual_seed(2)
for batch in data:
    x = batch.cuda() if cuda else batch
    optimizer.zero_grad()
    reconstructed, mu, logvar = model(x)
    loss = F.binary_cross_entropy(reconstructed, x, reduction="sum")
    loss += -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    loss.backward()
    optimizer.step()
    print("loss", loss.item() / len(x))
torch.manual_seed(3)
with torch.no_grad():
    print("test", model.decode(torch.randn(8, 4).to(device)).cpu().sum().item())
