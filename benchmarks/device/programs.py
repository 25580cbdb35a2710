"""The programs that bench_device.py measures: small ones that a CPU worker runs, or the reference sizes for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Step = Callable[[], Any]
"""One step; it may return before it is done."""
Make = Callable[[str, bool], Step]
"""Makes a step on a device, captured or not."""


class SeqCnn(nn.Module):
    """Johnson & Zhang's, as in MLPerf Training."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, taps) for taps in (3, 4))
        self.dropout, self.output = nn.Dropout(0.5), nn.Linear(2 * width, 2)

    def forward(self, ids: Any) -> Any:
        x = self.embedding(ids).transpose(1, 2)
        pooled = [functional.elu(convolution(x).amax(2)) for convolution in self.convolutions]
        return self.output(self.dropout(torch.cat(pooled, 1)))


class MiniLm(nn.Module):
    """An encoder of all-MiniLM-L6-v2's size."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30_522, 384)
        layer = nn.TransformerEncoderLayer(384, 12, 1536, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.output = nn.Linear(384, 2)

    def forward(self, ids: Any) -> Any:
        return self.output(self.layers(self.embedding(ids)).mean(1))


class Small(nn.Module):
    """Many ops that take no time: what a step costs besides."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(10)]
        self.embedding, self.layers = nn.Embedding(1000, 32), nn.Sequential(*layers, nn.Linear(32, 2))

    def forward(self, ids: Any) -> Any:
        return self.layers(self.embedding(ids).mean(1))


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions (He et al. 2015, with the stride in the second, as torchvision has it)."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        outside = 4 * width

        def convolution(one: int, other: int, size: int, stride: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(one, other, size, stride, size // 2, bias=False), nn.BatchNorm2d(other)]

        self.layers = nn.Sequential(
            *convolution(inside, width, 1),
            nn.ReLU(inplace=True),
            *convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *convolution(width, outside, 1),
        )
        fits = stride == 1 and inside == outside
        self.shortcut = nn.Identity() if fits else nn.Sequential(*convolution(inside, outside, 1, stride))

    def forward(self, x: Any) -> Any:
        return functional.relu(self.layers(x) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-50 at `width` 64 and `depths` (3, 4, 6, 3); smaller ones have the same blocks."""

    def __init__(self, width: int, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks, inside = [], width
        for stage, depth in enumerate(depths):
            for block in range(depth):
                blocks.append(Bottleneck(inside, width << stage, 2 if stage and not block else 1))
                inside = 4 * (width << stage)
        self.blocks, self.output = nn.Sequential(*blocks), nn.Linear(inside, 1000)

    def forward(self, images: Any) -> Any:
        return self.output(self.blocks(self.stem(images)).mean((2, 3)))


def ids(batch: int, length: int) -> Any:
    """Return token ids."""
    return torch.randint(1, 1000, (batch, length))


def images(batch: int, side: int) -> Any:
    """Return pictures."""
    return torch.rand(batch, 3, side, side)


def training(model_class: Callable[[], nn.Module], data: Callable[[], Any]) -> Make:
    """Train on one batch again and again, moved to the device each time; nothing is read."""

    def make(device: str, captured: bool) -> Step:
        torch.manual_seed(1)
        model = model_class().to(device)
        optimizer = torch.optim.Adam(model.parameters(), foreach=True)
        batch = data()
        labels = torch.randint(0, 2, (len(batch),))

        def step(batch: Any, labels: Any) -> Any:
            loss = functional.cross_entropy(model(batch), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        run = torch.compile(step) if captured else step
        return lambda: run(batch.to(device), labels.to(device))

    return make


def inference(model_class: Callable[[], nn.Module], data: Callable[[], Any]) -> Make:
    """Answer one batch again and again, and read each answer: one round trip."""

    def make(device: str, captured: bool) -> Step:
        torch.manual_seed(1)
        model = model_class().eval().to(device)
        answer = torch.compile(model) if captured else model
        batch = data()

        def step() -> Any:
            with torch.no_grad():
                return answer(batch.to(device)).cpu()

        return step

    return make


def _seqcnn() -> nn.Module:
    return SeqCnn(20_000, 256)


def _reference_seqcnn() -> nn.Module:
    return SeqCnn(30_000, 1024)


def _small_resnet() -> nn.Module:
    return ResNet(16, (1, 1, 1, 1))


def _resnet_50() -> nn.Module:
    return ResNet(64, (3, 4, 6, 3))


CPU: dict[str, Make] = {
    "small, training, batch 16": training(Small, lambda: ids(16, 8)),
    "minilm, inference, batch 1": inference(MiniLm, lambda: ids(1, 64)),
    "resnet blocks, training, batch 8, 64 px": training(_small_resnet, lambda: images(8, 64)),
    "resnet blocks, inference, batch 1, 64 px": inference(_small_resnet, lambda: images(1, 64)),
    "seqcnn 256, training, batch 16": training(_seqcnn, lambda: ids(16, 100)),
    "minilm, training, batch 4": training(MiniLm, lambda: ids(4, 32)),
}
"""What a CPU worker can do many times a second."""

CUDA: dict[str, Make] = {
    "small, training, batch 16": training(Small, lambda: ids(16, 8)),
    "minilm, inference, batch 1": inference(MiniLm, lambda: ids(1, 128)),
    "minilm, inference, batch 64": inference(MiniLm, lambda: ids(64, 128)),
    "minilm, training, batch 16": training(MiniLm, lambda: ids(16, 128)),
    "minilm, training, batch 64": training(MiniLm, lambda: ids(64, 128)),
    "seqcnn 1024, training, batch 256": training(_reference_seqcnn, lambda: ids(256, 256)),
    "resnet-50, training, batch 256, 224 px": training(_resnet_50, lambda: images(256, 224)),
    "resnet-50, inference, batch 1, 224 px": inference(_resnet_50, lambda: images(1, 224)),
    "resnet-50, inference, batch 256, 224 px": inference(_resnet_50, lambda: images(256, 224)),
}
"""The sizes of the references; not measured yet, since no GPU could be had."""

TABLES = {"cpu": CPU, "cuda": CUDA}
