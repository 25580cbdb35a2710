"""Of the form of pytorch/examples' mnist: a loader with a worker and pinned memory, dropout, a schedule."""

import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, 1)
        self.conv2 = nn.Conv2d(8, 16, 3, 1)
        self.norm = nn.BatchNorm2d(16)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(400, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.norm(self.conv2(x))), 2)
        x = self.dropout1(torch.flatten(x, 1))
        return F.log_softmax(self.fc2(self.dropout2(F.relu(self.fc1(x)))), dim=1)


def digits(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    images = torch.rand(count, 1, 14, 14, generator=generator) / 2
    images[torch.arange(count), 0, labels] += 0.5
    return TensorDataset(images, labels)


def main():
    torch.set_num_threads(1)
    use_accel = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if use_accel else torch.device("cpu")
    options = {"num_workers": 1, "persistent_workers": True, "pin_memory": True} if use_accel else {}
    # What loaders draw comes from a generator of theirs: the device's own is another than the host's.
    options["generator"] = torch.Generator().manual_seed(3)
    order = torch.randperm(320, generator=torch.Generator().manual_seed(4)).tolist()
    train = DataLoader(digits(320, 1), batch_size=32, sampler=order, **options)
    test = DataLoader(digits(64, 2), batch_size=64, **options)
    torch.manual_seed(1)
    model = Net().to(device)
    optimizer = optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
    torch.manual_seed(2)
    for _ in range(2):
        model.train()
        for data, target in train:
            data, target = data.to(device, non_blocking=True), target.to(device, non_blocking=True)
            optimizer.zero_grad()
            loss = F.nll_loss(model(data), target)
            loss.backward()
            optimizer.step()
            print("loss", loss.item())
        model.eval()
        with torch.no_grad():
            for data, target in test:
                output = model(data.to(device))
                print("test", F.nll_loss(output, target.to(device), reduction="sum").item())
        scheduler.step()


if __name__ == "__main__":
    main()
