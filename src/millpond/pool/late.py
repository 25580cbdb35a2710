"""Replaces functions of modules that a program may import later, as soon as it does, and imports none itself.

So the compilers of CUDA code say at once that the device is elsewhere, instead of looking for a driver.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from millpond.pool.errors import NeedsCuda

_WHAT_TO_DO = "Use ops of PyTorch, which run where the device is, or run on the GPU's own machine."


def install() -> None:
    """Watch imports from now on; what is there already is replaced now."""
    for name, replace in _REPLACE.items():
        if (module := sys.modules.get(name)) is not None:
            replace(module)
    sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        replace = _REPLACE.get(fullname)
        if replace is None:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, replace)
        return spec


class _Then(Loader):
    """Loads as another loader does, then replaces."""

    def __init__(self, loader: Loader, replace: Callable[[Any], None]) -> None:
        self.loader = loader
        self.replace = replace

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.replace(module)


def _cpp_extension(module: Any) -> None:
    """`torch.utils.cpp_extension`: C++ is compiled as ever, CUDA is refused."""

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def build(name: str, sources: Any = (), *args: Any, **kwargs: Any) -> Any:
            files = [sources] if isinstance(sources, str) else [str(source) for source in sources or ()]
            if kwargs.get("with_cuda") or kwargs.get("cuda_sources") or any(f.endswith((".cu", ".cuh")) for f in files):
                raise NeedsCuda(f"the CUDA extension {name!r}", _WHAT_TO_DO)
            return function(name, sources, *args, **kwargs)

        return build

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        raise NeedsCuda(f"the CUDA extension {name!r}", _WHAT_TO_DO)

    for name in ("load", "load_inline"):
        setattr(module, name, refusing(getattr(module, name)))
    module.CUDAExtension = refuse


def _triton(module: Any) -> None:
    """`triton.runtime.jit`: kernels can be defined, and not launched."""

    def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        raise NeedsCuda(f"the Triton kernel {getattr(kernel, '__name__', kernel)}", _WHAT_TO_DO)

    module.JITFunction.run = run


_REPLACE: dict[str, Callable[[Any], None]] = {
    "torch.utils.cpp_extension": _cpp_extension,
    "triton.runtime.jit": _triton,
}
