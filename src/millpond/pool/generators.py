"""`torch.Generator(device="cuda")`: a generator of its own on the pool device.

The worker has one generator per session. An op that is given another one runs between two exchanges of the worker's
state, so it costs two round trips; the program's default generator is not touched.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable
from typing import Any

import torch

from millpond.pool.session import Session
from millpond.pool.tensors import DEVICE

_alive: weakref.WeakValueDictionary[int, Generator] = weakref.WeakValueDictionary()
_meant: Callable[[Any], Any]
_shown: Callable[[torch.device], torch.device]
_open_session: Callable[[int], Session]


class _Kind(type(torch._C.Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch._C.Generator)


class Generator(torch._C.Generator, metaclass=_Kind):
    """`torch.Generator`, for the pool device too."""

    _cdata: int
    _device: torch.device
    _seed: int
    _state: torch.Tensor | None
    """As it was after the last op; None while only the seed is known."""

    def __new__(cls, device: Any = "cpu") -> Any:
        """Make one for a device."""
        device = torch.device(_meant(torch.device(device)))
        if device.type != DEVICE:
            return torch._C.Generator(device)
        self = torch._C.Generator.__new__(cls)
        self._device = torch.device(DEVICE, device.index or 0)
        self.manual_seed(torch._C.Generator().initial_seed())
        _alive[self._cdata] = self
        return self

    def __init__(self, device: Any = "cpu") -> None:
        """Nothing is left to do."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device that it draws on."""
        return _shown(self._device)

    def manual_seed(self, seed: int) -> Generator:
        """Begin anew from a seed."""
        self._seed, self._state = int(seed), None
        return self

    def seed(self) -> int:
        """Begin anew from a seed that nobody knows; return it."""
        self.manual_seed(secrets.randbits(53))
        return self._seed

    def initial_seed(self) -> int:
        """Return the seed that it began with."""
        return self._seed

    def get_state(self) -> torch.Tensor:
        """Return its state, as the worker's device has it."""
        if self._state is None:
            self.draw(lambda: None)
        assert self._state is not None
        return self._state.clone()

    def set_state(self, state: torch.Tensor) -> Generator:
        """Go on from a state."""
        self._state = state.clone()
        return self

    def clone_state(self) -> Generator:
        """Return another one in the same state."""
        other = Generator(self._device)
        other._seed, other._state = self._seed, None if self._state is None else self._state.clone()
        return other

    def draw(self, action: Callable[[], Any]) -> Any:
        """Do what draws random numbers on the device, and have it draw them from here."""
        session = _open_session(self._device.index)
        with session.lock:
            saved = session.random_state()
            if self._state is None:
                session.seed(self._seed)
            else:
                session.set_random_state(self._state)
            try:
                return action()
            finally:
                self._state = session.random_state()
                session.set_random_state(saved)


def install(
    meant: Callable[[Any], Any], shown: Callable[[torch.device], torch.device], open_session: Callable[[int], Session]
) -> None:
    """Put it in the place of PyTorch's."""
    global _meant, _shown, _open_session
    _meant, _shown, _open_session = meant, shown, open_session
    torch.Generator = Generator  # type: ignore[misc]


def of_pool(generator: torch._C.Generator) -> Generator:
    """Return the pool's generator that PyTorch's C++ passed on.

    Raises:
        RuntimeError: it is another device's.
    """
    known = _alive.get(generator._cdata)  # type: ignore[attr-defined]
    if known is None:
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
    return known
