"""Where PyTorch asks its C++ about several devices, which one made in Python cannot tell it: the same, in Python.

Its guard for such a device counts one, and knows no current one. So the current device is kept here, and what
`torch.nn.DataParallel` moves is moved by copies; `backward` has passes over several devices run in one thread.
See docs/decisions/0011-several-devices.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from millpond.pool.tensors import DEVICE

Tensor = torch.Tensor


def install(module: Any) -> None:
    """Make several devices work in this process. `module` is `torch.pool`."""
    native: Any = torch._C
    native._accelerator_getDeviceIndex = module.current_device
    native._accelerator_setDeviceIndex = module.set_device
    native._accelerator_exchangeDevice = native._accelerator_maybeExchangeDevice = module.exchange_device
    native._broadcast, native._broadcast_coalesced = broadcast, broadcast_coalesced
    native._scatter, native._gather = scatter, gather
    torch.cuda.nccl.is_available = lambda tensors: False


def broadcast(tensor: Tensor, devices: Sequence[int]) -> list[Tensor]:
    """Return the tensor on each device."""
    return [tensor.to(torch.device(DEVICE, index)) for index in devices]


def broadcast_coalesced(tensors: Sequence[Tensor], devices: Sequence[int], buffer_size: int) -> list[list[Tensor]]:
    """Return all the tensors on each device."""
    return [[tensor.to(torch.device(DEVICE, index)) for tensor in tensors] for index in devices]


def scatter(
    tensor: Tensor, devices: Sequence[int], chunk_sizes: Sequence[int] | None, dim: int, streams: Any
) -> list[Tensor]:
    """Return a part of the tensor on each device, along `dim`."""
    parts = tensor.chunk(len(devices), dim) if chunk_sizes is None else tensor.split(list(chunk_sizes), dim)  # type: ignore[no-untyped-call]
    return [part.to(torch.device(DEVICE, index)) for part, index in zip(parts, devices, strict=False)]


def gather(tensors: Sequence[Tensor], dim: int, destination: int | None) -> Tensor:
    """Return tensors joined along `dim` on one device; -1 is the host."""
    device = torch.device("cpu") if destination == -1 else torch.device(DEVICE, destination or 0)
    return torch.cat([tensor.to(device) for tensor in tensors], dim)
