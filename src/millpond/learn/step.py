"""One step of training: forward with loss, and the optimizer's update, as they are or through `torch.compile`.

On a pool device what goes through `torch.compile` is captured: forward with loss, backward and update are then one
message each. The learning rate is a tensor there, for a number that changes would be traced anew at every step.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from millpond.learn.models import TextModel
from millpond.learn.options import TrainingError, TrainOptions, rate_at

log = logging.getLogger("millpond.learn")


def is_pooled(device: torch.device) -> bool:
    """Return whether a device is one of a pool, which programs may also call `cuda`."""
    return hasattr(torch, "pool") and device.type != "cpu"


def is_captured(model: nn.Module, options: TrainOptions, device: torch.device) -> bool:
    """Return whether a training on `device` is captured: as the options say, or else on a pool's GPU.

    Where it is not although it should be, the log says why.
    """
    if not is_pooled(device) or options.compile is False:
        return False
    # A CPU worker is kept busy by a few large ops: tracing costs seconds there and gains nothing (decision 0009).
    if options.compile is None and not torch.pool.is_gpu(device):  # type: ignore[attr-defined]
        return False
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        log.warning("training runs op by op, not captured: PyTorch's compiler does not trace recurrent layers")
        return False
    if options.precision != "float32":
        log.warning("training runs op by op, not captured: in mixed precision the pool's recorder cannot part the step")
        return False
    return True


def _is_not_about_profiling(record: logging.LogRecord) -> bool:
    return "Profiler record function" not in record.getMessage()


class Step:
    """What a step computes, on the device of its model."""

    def __init__(
        self,
        model: TextModel,
        options: TrainOptions,
        device: torch.device,
        loss_of: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.captured = is_captured(model, options, device)
        rate = rate_at(0, 1, options)
        self.optimizer = torch.optim.Adam(
            model.parameters(),
            lr=torch.tensor(rate, device=device) if self.captured else rate,
            foreach=True,
            capturable=self.captured,
        )
        self._model, self._device, self._loss_of = model, device, loss_of
        self._low = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(options.precision or "")
        self._forward = self._compute
        self._step: Callable[[], object] = self.optimizer.step
        if self.captured or (options.compile and not is_pooled(device)):
            torch.compiler.reset()  # Dynamo compiles a function for so many models only, and keeps each of them
            self._forward = torch.compile(self._compute, dynamic=True if self.captured else None)
        if self.captured:
            # It says of each optimizer that the profiler's mark around its step is not traced.
            logging.getLogger("torch._dynamo.variables.ctx_manager").addFilter(_is_not_about_profiling)
            self._step = torch.compile(self.optimizer.step)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next update."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def forward(self, batch: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and mean loss of a batch and what is wanted of it, in the precision asked for.

        Raises:
            TrainingError: PyTorch cannot compile it here.
        """
        try:
            return self._forward(batch, wanted)
        except torch._dynamo.exc.TorchDynamoException as error:
            self._go_on_uncompiled(error)
            return self._forward(batch, wanted)

    def update(self, scaler: torch.amp.GradScaler) -> None:
        """Change the weights by their gradients."""
        if scaler.is_enabled():
            scaler.step(self.optimizer)  # reads whether a gradient was no number, so it is not captured
            scaler.update()
            return
        try:
            self._step()
        except torch._dynamo.exc.TorchDynamoException as error:  # while compiling: no weight has changed yet
            self._go_on_uncompiled(error)
            self._step()

    def _go_on_uncompiled(self, error: Exception) -> None:
        why = " ".join(str(error).split("\n")[:2]).rstrip(".")  # which backend, and then what it says
        if not self.captured:
            raise TrainingError(f"the step cannot be compiled here: {why}. Train without --compile.") from error
        log.warning("training runs op by op, not captured: %s", why)
        self._forward, self._step = self._compute, self.optimizer.step

    def _compute(self, batch: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self._device.type, dtype=self._low) if self._low else contextlib.nullcontext():
            logits = self._model(batch, len(wanted))
        return logits, self._loss_of(logits.float(), wanted)
