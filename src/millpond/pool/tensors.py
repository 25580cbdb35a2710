"""Tensors of the pool device: PyTorch's own, over storages that hold an address and a handle instead of bytes.

The only way from Python to a real tensor of an out-of-tree device is DLPack: a `Mold` is a DLPack description that is
cast again and again. The address is unique and never mapped, so that aliasing is told right and a stray access from
C++ faults instead of reading something else. See docs/decisions/ for why not a tensor subclass.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

from millpond.pool import codec

DEVICE = "pool"
"""The name of the device type."""

LARGE_BYTES = 1 << 20
"""A tensor of so many bytes is freed at the worker before the next op; smaller ones go together with the next batch."""
HUGE_PAGES_FROM_BYTES = 4 << 20
"""New memory of the host of so many bytes is asked for in huge pages."""
_EXTENSION_DEVICE = 12
"""kDLExtDev: what DLPack calls the device that PyTorch calls PrivateUse1."""
_ALIGNMENT = 512

_CODES = {
    torch.bool: 6,
    torch.bfloat16: 4,
    **dict.fromkeys((torch.int8, torch.int16, torch.int32, torch.int64), 0),
    **dict.fromkeys((torch.uint8, torch.uint16, torch.uint32, torch.uint64), 1),
    **dict.fromkeys((torch.float16, torch.float32, torch.float64), 2),
    **dict.fromkeys((torch.complex32, torch.complex64, torch.complex128), 5),
}
"""DLPack's type codes."""

Geometry = tuple[torch.dtype, torch.Size, tuple[int, ...], int]
"""dtype, sizes, strides, offset in elements."""


class Owner(Protocol):
    """What gives handles and takes them back."""

    index: int
    frees: deque[Any]
    large_frees: deque[Any]
    watched: dict[int, Freed]
    address: int


class Freed(weakref.ref["Remote"]):
    """A watch on a remote: its owner finds it in `frees` once the remote is gone.

    Not a `__del__`: that is Python code, and a Ctrl-C which falls into it is lost, with the handle. This callback is
    `deque.append`, into which no signal handler can fall; it is also atomic, whatever lock is held when it runs.
    """

    __slots__ = ("handle",)
    handle: int


class Remote:
    """What a storage stands for: a handle at the worker, which is freed when the storage is."""

    __slots__ = ("__weakref__", "geometry", "handle", "negated", "session")

    def __init__(self, session: Any, handle: int, geometry: Geometry, nbytes: int) -> None:
        self.session = session
        self.handle = handle
        self.geometry = geometry
        """Of the tensor that the storage was made for."""
        self.negated = False
        """Whether there is, or was, a lazily negated view of all of it."""
        frees = session.large_frees if nbytes >= LARGE_BYTES else session.frees
        watch = session.watched[handle] = Freed(self, frees.append)
        watch.handle = handle


def use_huge_pages(tensor: torch.Tensor) -> None:
    """Ask the kernel for huge pages where a large, contiguous tensor in the host's memory has none yet.

    The kernel makes a page as it is first written to, which for 1 GiB in pages of 4 KiB takes longer than a fast
    network. Where the pages are there, or the kernel has no huge ones to give, all stays as it was.
    """
    nbytes = tensor.numel() * tensor.itemsize
    if _madvise is None or nbytes < HUGE_PAGES_FROM_BYTES:
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    _madvise(ctypes.c_void_p(start), ctypes.c_size_t(tensor.data_ptr() + nbytes - start), mmap.MADV_HUGEPAGE)


_madvise = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Managed(ctypes.Structure):
    """DLManagedTensor. PyTorch looks at it again when the storage dies, so each tensor gets a copy of its own."""

    _fields_ = (
        ("data", ctypes.c_int64),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_SIZE = ctypes.sizeof(_Managed)
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_libc = ctypes.PyDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = (ctypes.c_size_t,)
_libc.memcpy.restype = ctypes.c_void_p
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_malloc, _memcpy = _libc.malloc, _libc.memcpy
_free = ctypes.cast(_libc.free, ctypes.c_void_p)
"""The deleter of all descriptions: libc's `free`, which needs neither the interpreter nor its lock."""
_from_dlpack = torch._C._from_dlpack
_set: Callable[..., torch.Tensor] = torch.ops.aten.set_.source_Storage_storage_offset._op_dk
_CPU = torch._C.DispatchKey.CPU


class Mold:
    """Casts tensors of one geometry on one device. Not for two threads at once: the session's lock is held."""

    __slots__ = ("_address", "_keep", "_managed", "device", "dtype", "geometry", "nbytes", "room", "sizes", "strides")

    def __init__(self, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], index: int) -> None:
        self.dtype, self.sizes, self.strides = dtype, tuple(sizes), tuple(strides)
        self.device = torch.device(DEVICE, index)
        self.geometry: Geometry = (dtype, torch.Size(sizes), self.strides, 0)
        self.nbytes = codec.span(self.sizes, self.strides) * dtype.itemsize
        self.room = self.nbytes // _ALIGNMENT * _ALIGNMENT + _ALIGNMENT
        self._managed = None
        if dtype in _CODES:
            dims = max(1, len(sizes))
            shape, steps = (ctypes.c_int64 * dims)(*sizes), (ctypes.c_int64 * dims)(*strides)
            kind = _DataType(_CODES[dtype], dtype.itemsize * 8, 1)
            self._managed = _Managed(
                0, _Device(_EXTENSION_DEVICE, index), len(sizes), kind, shape, steps, 0, None, _free
            )
            self._keep = (shape, steps)
            self._address = ctypes.addressof(self._managed)

    def cast(self, session: Owner, handle: int) -> torch.Tensor:
        """Return a tensor of this geometry that stands for `handle`."""
        address = session.address
        session.address = address + self.room
        managed = self._managed
        if managed is None:
            tensor = self._cast_odd(address)
        else:
            managed.data = address
            copy = _memcpy(_malloc(_SIZE), self._address, _SIZE)
            tensor = _from_dlpack(_capsule(copy, b"dltensor", None))
        tensor.untyped_storage().remote = Remote(session, handle, self.geometry, self.nbytes)  # type: ignore[attr-defined]
        return tensor

    def _cast_odd(self, address: int) -> torch.Tensor:
        """Cast a dtype that DLPack lacks."""
        storage = torch._C._construct_storage_from_data_pointer(address, self.device, self.nbytes)
        tensor = torch._C._acc.create_empty_tensor((0,), self.dtype)
        return _set(_CPU, tensor, storage, 0, self.sizes, self.strides)


def first_address(index: int) -> int:
    """Return where the addresses of a device begin: beyond what any process can map."""
    return (1 << 58) + (index << 54)


def set_storage(
    tensor: torch.Tensor,
    storage: torch.UntypedStorage,
    offset: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...] = (),  # PyTorch leaves them out for a tensor without dimensions
) -> torch.Tensor:
    """Have a tensor look at `storage` from now on."""
    return _set(_CPU, tensor, storage, offset, sizes, strides)


_device_of: Callable[[torch.Tensor], torch.device] = torch._C.TensorBase.device.__get__


def device_of(tensor: torch.Tensor) -> torch.device:
    """Return a tensor's real device, whatever `cuda` makes of `Tensor.device`."""
    device = _device_of(tensor)
    # Under a mode of torch functions PyTorch's own getter comes back to the one in Python. Nothing is really on cuda.
    return device if device.type != "cuda" else torch.device(DEVICE, device.index)


storage_device_of: Callable[[Any], torch.device] = torch._C.StorageBase.device.__get__  # type: ignore[attr-defined]
"""Returns a storage's real device."""


is_gpu: Callable[[int], bool] = bool
"""Returns whether the worker of a device has a GPU; set by `device.register`."""


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Return whether the worker that has a tensor has it on a GPU."""
    return is_gpu(device_of(tensor).index)


def remote_of(tensor: torch.Tensor) -> Remote | None:
    """Return what a tensor's storage stands for; None for one that is not the pool's."""
    return getattr(tensor.untyped_storage(), "remote", None)
