"""What a program has set for its whole process and its ops compute by: default dtype, precision, determinism, cuDNN.

PyTorch keeps these for a process and asks for them in its kernels; the ops of a worker belong to several programs. So
they are part of an op's signature and travel with it; at the worker ops of the same settings run side by side, and
those of others take turns with them.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from millpond.pool import codec, wire

State = tuple[Any, ...]
"""The default dtype, then the fields of `wire.Numerics` after it."""

# Asked for at every op, so each is one call of PyTorch's own.
_dtype = torch.get_default_dtype
_matmul = torch._C._get_float32_matmul_precision
_tf32 = torch._C._get_cudnn_allow_tf32
_fp16_reduction = torch._C._get_cublas_allow_fp16_reduced_precision_reduction
_bf16_reduction = torch._C._get_cublas_allow_bf16_reduced_precision_reduction
_fp16_accumulation = torch._C._get_cublas_allow_fp16_accumulation
_deterministic = torch._C._get_deterministic_algorithms
_warns = torch._C._get_deterministic_algorithms_warn_only
_fills = torch._C._get_deterministic_fill_uninitialized_memory
_cudnn = torch._C._get_cudnn_enabled
_cudnn_benchmark = torch._C._get_cudnn_benchmark
_cudnn_deterministic = torch._C._get_cudnn_deterministic
_of, _set = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter


def current() -> State:
    """Return what holds in this process now."""
    try:
        matmul, conv = _matmul(), _tf32()
        rnn = conv
    except RuntimeError:  # the newer settings were used, `torch.backends.cudnn.conv.fp32_precision` and its like
        matmul = "high" if _of("cuda", "matmul") == "tf32" else "highest"
        conv, rnn = _of("cuda", "conv") == "tf32", _of("cuda", "rnn") == "tf32"
    return (
        _dtype(),
        matmul,
        conv,
        rnn,
        _fp16_reduction(),
        _bf16_reduction(),
        _fp16_accumulation(),
        _deterministic(),
        _warns(),
        _fills(),
        _cudnn(),
        _cudnn_benchmark(),
        _cudnn_deterministic(),
    )


def described(state: State) -> wire.Numerics:
    """Return a state as it travels."""
    return wire.Numerics(codec.DTYPE_NAMES[state[0]], *state[1:])  # type: ignore[arg-type]


_lock = threading.Lock()
_idle = threading.Condition(_lock)
_running = 0
"""How many ops run under the settings that there are now."""
_waiting = 0
"""How many wait until none runs: newcomers then wait too, so that an end comes to every wait."""
_settings: wire.Numerics | None = None
"""What this process was set to last."""


class Setting:
    """Has this process compute as told for the length of a `with` block. Can be used again, and by several threads."""

    __slots__ = ("_numerics",)

    def __init__(self, numerics: wire.Numerics) -> None:
        self._numerics = numerics

    def __enter__(self) -> None:
        global _running, _waiting, _settings
        with _lock:
            if _waiting or _settings != self._numerics:
                _waiting += 1
                while _running:
                    _idle.wait()
                _waiting -= 1
                _apply(self._numerics)
                _settings = self._numerics
            _running += 1

    def __exit__(self, *exception: object) -> None:
        global _running
        with _lock:
            _running -= 1
            if not _running and _waiting:
                _idle.notify_all()


def _apply(numerics: wire.Numerics) -> None:
    torch.set_default_dtype(codec.dtype(numerics.default_dtype))
    torch.set_float32_matmul_precision(numerics.matmul_precision)
    torch._C._set_cudnn_allow_tf32(numerics.conv_tf32)
    if numerics.rnn_tf32 != numerics.conv_tf32:  # which only the newer settings can say
        _set("cuda", "rnn", "tf32" if numerics.rnn_tf32 else "ieee")
    torch._C._set_cublas_allow_fp16_reduced_precision_reduction(*numerics.fp16_reduction)
    torch._C._set_cublas_allow_bf16_reduced_precision_reduction(*numerics.bf16_reduction)
    torch._C._set_cublas_allow_fp16_accumulation(numerics.fp16_accumulation)
    torch._C._set_deterministic_algorithms(numerics.deterministic, warn_only=numerics.deterministic_warns)
    torch._C._set_deterministic_fill_uninitialized_memory(numerics.deterministic_fill)
    torch._C._set_cudnn_enabled(numerics.cudnn)
    torch._C._set_cudnn_benchmark(numerics.cudnn_benchmark)
    torch._C._set_cudnn_deterministic(numerics.cudnn_deterministic)
