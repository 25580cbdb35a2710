"""Where a training is: everything that its loop changes, and so everything that a checkpoint holds.

The learning rate and the order of the texts are not here: both follow from the step and the seed alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from millpond.learn.progress import Position, Standing, below


@dataclass
class State(Standing):
    """The loop's variables."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    totals: Tensor
    """Loss and right answers, summed over the texts of this epoch, on the device."""
    best_weights: dict[str, Tensor] | None = None
    """Weights of epoch `best`; None where there is none yet."""

    def position(self, seconds: float) -> Position:
        """Return the plain values; `seconds` is what the epoch has taken so far."""
        return self.position_on(self.device.type, seconds, self.scaler.state_dict())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name: weights, best weights, optimizer, sums, random numbers of host and device."""
        tensors = {"totals": self.totals, "rng.host": torch.get_rng_state()}
        if self.device.type != "cpu":
            tensors["rng.device"] = torch.get_device_module(self.device).get_rng_state(self.device)
        tensors |= {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in (self.best_weights or {}).items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in values.items()}
        return tensors

    def restore(self, position: Position, tensors: Mapping[str, Tensor]) -> None:
        """Go back to where `position` and `tensors` were taken.

        Raises:
            KeyError, RuntimeError, ValueError: they are not those of this model and optimizer.
        """
        self.model.load_state_dict(below("model.", tensors))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in below("optimizer.", tensors).items():
            number, _, key = name.partition(".")
            if tensor.dim() and tensor.shape != parameters[int(number)].shape:
                raise ValueError(f"{name} has the shape {list(tensor.shape)}")
            states.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": states})
        if position.scaler:
            self.scaler.load_state_dict(position.scaler)
        self.totals.copy_(tensors["totals"])
        best = {name: tensor.to(self.device) for name, tensor in below("best.", tensors).items()}
        self.best_weights = best or None
        self.go_back(position)
        torch.set_rng_state(tensors["rng.host"])
        if self.device.type != "cpu" and position.device == self.device.type:
            torch.get_device_module(self.device).set_rng_state(tensors["rng.device"], self.device)
