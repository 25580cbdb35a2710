"""`cuda` as another name of the pool device, for programs that know no other.

PyTorch's C++ never sees a tensor on `cuda`: what makes one there makes it on the pool. Once a program has said `cuda`,
Python shows it `cuda` wherever the device is meant; one that never does is shown `pool`, and pays nothing.
See docs/decisions/0007-cuda-is-a-name-of-the-pool-device.md.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils._device import DeviceContext, _device_constructors

from millpond.pool import accelerator, autocast, cuda_runtime, generators, late
from millpond.pool.errors import NeedsCuda
from millpond.pool.operators import DENIED
from millpond.pool.tensors import DEVICE, device_of, storage_device_of

Tensor = torch.Tensor
aten = torch.ops.aten

NAME = "cuda"

_said = False
_current_index: Callable[[], int]
_shown_devices: list[torch.device] = []


def install(library: torch.library.Library, module: Any) -> None:
    """Make `cuda` mean the pool device in this process. `module` is `torch.pool`."""
    global _current_index
    _current_index = module.current_device
    _shown_devices.extend(torch.device(NAME, index) for index in range(module.device_count()))
    _device_constructors()  # the mode of a default device knows functions by identity: PyTorch's own, not ours
    DeviceContext.__init__ = _mode_meaning_pool(DeviceContext.__init__)  # type: ignore[method-assign]
    with warnings.catch_warnings():  # PyTorch's build for CUDA has factories of its own
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        _make_factories(library)
    for owner, names in _TAKES_DEVICE:
        for name in names:
            setattr(owner, name, _meaning_pool(getattr(owner, name)))
    Tensor.to = _to  # type: ignore[method-assign,assignment]
    Tensor.cuda = _cuda  # type: ignore[method-assign,assignment]
    Tensor.type = _type  # type: ignore[method-assign,assignment]
    UninitializedTensorMixin._allowed_methods += [Tensor.to, Tensor.cuda]  # as PyTorch's own are
    Tensor.__cuda_array_interface__ = property(_no_pointer)  # type: ignore[method-assign,assignment]
    Tensor.__dlpack__ = _refusing_pool(Tensor.__dlpack__)  # type: ignore[method-assign]
    for owner in (torch, torch.utils.dlpack):
        owner.to_dlpack = _refusing_pool(owner.to_dlpack)  # type: ignore[attr-defined]
    torch.UntypedStorage.__new__ = _meaning_pool(torch.UntypedStorage.__new__)  # type: ignore[method-assign]
    torch.UntypedStorage._share_cuda_ = _no_sharing  # type: ignore[method-assign,assignment]
    for name in ("_share_fd_cpu_", "_share_filename_cpu_"):
        setattr(torch.UntypedStorage, name, _sharing_host(getattr(torch.UntypedStorage, name)))
    Tensor.numpy = _numpy  # type: ignore[method-assign,assignment]
    torch.get_default_device = _showing(torch.get_default_device)
    generators.install(meant, shown, module.session)
    autocast.install(library)
    cuda_runtime.install(module, meant, shown)
    accelerator.install(module, meant)
    late.install()
    torch.jit.load = _loading(torch.jit.load)
    torch.set_default_tensor_type = _set_legacy_default


def say() -> None:
    """Show the device as `cuda` from now on: the program has called it so."""
    global _said
    if _said:
        return
    _said = True
    Tensor.device = property(_device)  # type: ignore[assignment]
    Tensor.is_cuda = property(_is_cuda)  # type: ignore[assignment]
    torch.UntypedStorage.device = property(lambda storage: shown(storage_device_of(storage)))  # type: ignore[assignment]
    torch.accelerator.current_accelerator = _showing(torch.accelerator.current_accelerator)
    for owner in (torch.accelerator, torch.accelerator.memory):
        owner._get_device_index = _shown_as_argument(owner._get_device_index)  # type: ignore[attr-defined]


def meant(device: Any) -> Any:
    """Return the device that a program means: the pool's for one that it calls `cuda`, any other as it is.

    A device of the pool without an index is the current one.
    """
    if type(device) is torch.device:
        if device.type != NAME and (device.type != DEVICE or device.index is not None):
            return device
    elif not isinstance(device, str) or not (device.startswith(NAME) or device == DEVICE):
        return device
    else:
        device = torch.device(device)
    if device.type == NAME:
        say()
    return torch.device(DEVICE, _current_index() if device.index is None else device.index)


def shown(device: torch.device) -> torch.device:
    """Return a device as the program calls it."""
    if not _said or device.type != DEVICE:
        return device
    return torch.device(NAME) if device.index is None else torch.device(NAME, device.index)


def name(index: int) -> str:
    """Return what the program calls a device."""
    return str(shown(torch.device(DEVICE, index)))


def _device(tensor: Tensor) -> torch.device:
    device = device_of(tensor)
    return _shown_devices[device.index] if device.type == DEVICE else device


def _is_cuda(tensor: Tensor) -> bool:
    return device_of(tensor).type == DEVICE


def _showing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that returns a device as the program calls it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = function(*args, **kwargs)
        return device if device is None else shown(device)

    return call


def _shown_as_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that compares a device with the accelerator, and takes each by either name."""

    @functools.wraps(function)
    def call(device: Any, *args: Any, **kwargs: Any) -> Any:
        named = torch.device(device) if isinstance(device, str) else device
        return function(shown(named) if isinstance(named, torch.device) else named, *args, **kwargs)

    return call


# --- where a device comes in ---------------------------------------------------------------------------------------


def _make_factories(library: torch.library.Library) -> None:
    """Give all ops that make tensors of nothing a kernel for the key CUDA, which no tensor here has."""
    for full in torch._C._dispatch_get_all_op_names():
        name = full.removeprefix("aten::")
        if name == full or DENIED.match(full):
            continue
        packet, _, overload = name.partition(".")
        op = getattr(getattr(aten, packet), overload or "default")
        arguments = op._schema.arguments
        if any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments):
            library.impl(name, _factory(op), "CUDA")  # type: ignore[no-untyped-call]


def _factory(op: torch._ops.OpOverload) -> Callable[..., Tensor]:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        kwargs["device"] = meant(kwargs.get("device", NAME))
        return op(*args, **kwargs)  # type: ignore[no-any-return]

    return make


def _meaning_pool(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that takes `device=`, and takes `cuda` there for the pool."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if (device := kwargs.get("device")) is not None:
            kwargs["device"] = meant(device)
        return function(*args, **kwargs)

    return call


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return `torch.jit.load`, that takes `cuda` for the pool."""

    @functools.wraps(load)
    def call(file: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return load(file, meant(map_location), *args, **kwargs)

    return call


def _mode_meaning_pool(init: Callable[..., None]) -> Callable[..., None]:
    def start(self: Any, device: Any) -> None:
        init(self, meant(device))

    return start


_sparse = [f"sparse_{layout}_tensor" for layout in ("coo", "csr", "csc", "bsr", "bsc", "compressed")]
_TAKES_DEVICE: list[tuple[Any, list[str]]] = [
    (torch, ["tensor", "as_tensor", "asarray", *_sparse]),
    (Tensor, ["new_tensor", "pin_memory", "is_pinned"]),
]
"""What asks PyTorch's C++ for the current device of `cuda`; it has none, where all others only allocate."""

_tensor_to: Callable[..., Tensor] = Tensor.to
_tensor_type: Callable[..., Any] = Tensor.type


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`."""
    if args:
        first = args[0]
        if isinstance(first, str) or type(first) is torch.device:
            return _tensor_to(self, meant(first), *args[1:], **kwargs)
        if type(first) is int:  # the accelerator's index
            return _tensor_to(self, torch.device(DEVICE, first), *args[1:], **kwargs)
    if (device := kwargs.get("device")) is not None:
        kwargs["device"] = meant(device)
    return _tensor_to(self, *args, **kwargs)


def _cuda(
    self: Tensor,
    device: Any = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """`Tensor.cuda`."""
    say()
    device = torch.device(NAME, device) if isinstance(device, int) else device or NAME
    if torch.device(device).type != NAME:
        raise RuntimeError(f"Invalid device, must be cuda device, not {device}")
    return _tensor_to(self, meant(device), non_blocking=non_blocking, memory_format=memory_format)


def _type(self: Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
    """`Tensor.type`, with the names and classes of legacy tensors: `torch.cuda.FloatTensor`."""
    legacy = cuda_runtime.legacy_type(dtype)
    if legacy is not None:
        return _tensor_to(self, meant(NAME), legacy, non_blocking)
    if dtype is None:
        name: str = _tensor_type(self)
        return name.replace(f"torch.{DEVICE}.", "torch.cuda.") if _said else name
    return _tensor_type(self, dtype, non_blocking, **kwargs)


_set_default_tensor_type: Callable[[Any], None] = torch.set_default_tensor_type


def _set_legacy_default(kind: Any) -> None:
    """`torch.set_default_tensor_type`, which programs from before `torch.set_default_device` call."""
    legacy = cuda_runtime.legacy_type(kind)
    if legacy is not None:
        torch.set_default_dtype(legacy)
        torch.set_default_device(NAME)
        return
    _set_default_tensor_type(kind)
    if meant(torch.get_default_device()).type == DEVICE:
        torch.set_default_device("cpu")


# --- what cannot be ------------------------------------------------------------------------------------------------


def _no_pointer(tensor: Tensor) -> Any:
    if device_of(tensor).type != DEVICE:
        raise AttributeError("Can't get __cuda_array_interface__ on non-CUDA tensor type")
    raise NeedsCuda("the memory of a tensor", "Copy the tensor to the host first: tensor.cpu().")


def _refusing_pool(export: Callable[..., Any]) -> Callable[..., Any]:
    """Return an export of a tensor's memory that refuses those of the pool."""

    @functools.wraps(export)
    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if device_of(tensor).type == DEVICE:
            raise NeedsCuda("the memory of a tensor", "Copy the tensor to the host first: tensor.cpu().")
        return export(tensor, *args, **kwargs)

    return call


_tensor_numpy: Callable[..., Any] = Tensor.numpy


def _numpy(self: Tensor, *, force: bool = False) -> Any:
    """`Tensor.numpy`, whose refusal names the device as the program does."""
    try:
        return _tensor_numpy(self, force=force)
    except TypeError as error:
        device = device_of(self)
        raise TypeError(str(error).replace(str(device), str(shown(device)))) from None


def _sharing_host(share: Callable[..., Any]) -> Callable[..., Any]:
    """Return a way to share a storage with other processes that refuses one of the pool."""

    @functools.wraps(share)
    def call(storage: Any, *args: Any, **kwargs: Any) -> Any:
        if storage_device_of(storage).type == DEVICE:
            _no_sharing(storage)
        return share(storage, *args, **kwargs)

    return call


def _no_sharing(storage: Any, *args: Any, **kwargs: Any) -> Any:
    raise NeedsCuda("a tensor that other processes share", "Send tensors in the host's memory: tensor.cpu().")
