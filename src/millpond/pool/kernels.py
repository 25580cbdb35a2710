"""What the pool device does when PyTorch calls an op on it: one generic path, and a short list of special ones.

The generic path takes the call's signature, finds or makes its plan, issues one small item, and returns tensors that
exist at the worker only once it gets there. Views never leave this process: they share storage, as everywhere.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from millpond.pool import codec, cuda, generators, wire
from millpond.pool.attention import attention
from millpond.pool.errors import LeaseError, WireError
from millpond.pool.operators import allowed
from millpond.pool.plan import Op, Plan, Signature, make, on_meta
from millpond.pool.session import Session
from millpond.pool.tensors import DEVICE, Mold, Remote, device_of, remote_of, set_storage, use_huge_pages

Tensor = torch.Tensor
aten = torch.ops.aten

MAX_PLANS = wire.MAX_PLANS // 2
"""Plans that are kept; then all are forgotten, and made again as they are needed."""

INDEXING = ("aten::index", "aten::_index", "aten::_unsafe_index")
"""Ops that take indices in the host's memory, as on a GPU."""

MASKING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
"""Ops that take masks among their indices."""

open_session: Callable[[int], Session]
"""Returns the session of a device; set by `device.register`."""

current_device: Callable[[], int] = int
"""Returns the device that one without an index means; set by `device.register`."""


def call(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op on the pool."""
    if kwargs.get("pin_memory"):
        raise RuntimeError("Only dense CPU tensors can be pinned, not those of the pool device")
    kwargs.pop("pin_memory", None)
    if op.takes_device and kwargs.get("device") is not None and kwargs["device"].type != DEVICE:
        return op.overload(*on_meta(args), **kwargs)  # zeros_like(…, device="cpu"): only how a tensor looks matters
    if op.generator is not None:
        by_position = op.generator < len(args)
        given = args[op.generator] if by_position else kwargs.get("generator")
        if given is not None:
            args = (*args[: op.generator], None, *args[op.generator + 1 :]) if by_position else args
            kwargs = kwargs if by_position else {**kwargs, "generator": None}
            return generators.of_pool(given).draw(lambda: call(op, args, kwargs))
    signature = Signature(op)
    signature.take(args, kwargs)
    if signature.foreign:
        return call(op, *_bring(op, signature, args, kwargs))
    session = signature.session
    if session is None:
        device = kwargs.get("device")
        index = device.index if device is not None and device.type == DEVICE else None
        session = open_session(current_device() if index is None else index)
        if op.takes_device and device is None:
            kwargs["device"] = torch.device(DEVICE, session.index)
    key = tuple(signature.key)
    with session.lock:
        if session.failure is not None:
            session.raise_failure()
        plan = session.plans.get(key) or _plan(session, key, op, args, kwargs)
        if plan.ask and plan.refusal is None and op.without_out is not None:
            return _into(op, op.without_out, args, kwargs)
        if plan.resizes:
            for place, sizes, strides in plan.resizes:
                resize(args[place] if isinstance(place, int) else kwargs[place], sizes, strides)
            return call(op, args, kwargs)
        handles = [remote.handle for remote in signature.remotes]
        numbers = [codec.number(n) if type(n) is complex or type(n) is int else n for n in signature.numbers]
        if plan.ask:
            return _ask(session, plan, args, kwargs, handles, numbers)
        molds = plan.molds
        first = session.new_handles(len(molds))
        new = [mold and mold.cast(session, first + place) for place, mold in enumerate(molds)]
        session.issue(wire.Call(plan.id, handles, first, numbers), plan)
    if op.in_place:
        return args[0]
    if len(new) == 1 and len(op.new) == 1 and plan.counts[0] is None:
        return new[0]
    return _assemble(op, plan.counts, iter(new), args, kwargs)


def _plan(session: Session, key: tuple[Any, ...], op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
    if len(session.plans) >= MAX_PLANS:
        session.plans.clear()
    plan = session.plans[key] = make(op, len(session.plans), session.index, key, args, kwargs)
    session.issue(plan.define, plan)
    return plan


def _into(op: Op, without_out: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op with `out=` whose shapes only the worker knows: make its results, then have the outputs take them."""
    made = call(without_out, args, {name: value for name, value in kwargs.items() if name not in op.writes})
    results = made if isinstance(made, tuple) else (made,)
    outs = {str(name): kwargs[str(name)] for name in op.writes}
    if any(out.dtype != result.dtype for out, result in zip(outs.values(), results, strict=True)):
        # Which dtypes it can write to is the op's to say.
        pairs = zip(outs.items(), results, strict=True)
        written = {name: torch.empty_like(result, dtype=out.dtype) for (name, out), result in pairs}
        call(op.outright, args, {**kwargs, **written})
        results = tuple(written.values())
    for out, result in zip(outs.values(), results, strict=True):
        copy_(out if out.shape == result.shape else resize(out, tuple(result.shape), result.stride()), result)
    return next(iter(outs.values())) if len(outs) == 1 else tuple(outs.values())


def _ask(
    session: Session, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], handles: list[int], numbers: list[Any]
) -> Any:
    """Run an op whose results only the worker knows, and wait for them."""
    first = session.new_handles(wire.MAX_ITEMS)
    answer, _ = session.request(wire.Ask(plan.id, handles, first, numbers), wire.Results, plan)
    if plan.refusal is not None and plan.op.without_out is not None:  # what it made of its outputs' shapes is not known
        raise RuntimeError(plan.refusal)
    new: list[Any] = []
    for place, result in enumerate(answer.results):
        if isinstance(result, wire.Geometry):
            mold = Mold(codec.dtype(result.dtype), result.sizes, result.strides, session.index)
            new.append(mold.cast(session, first + place))
        else:
            new.append(codec.from_number(result) if result is not None else None)
    if not plan.op.by_value:
        session.issue(plan.learn(answer.results), plan)
    return _assemble(plan.op, plan.op.counts(len(new)), iter(new), args, kwargs)


def _assemble(
    op: Op, counts: list[int | None], new: Iterator[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return new results and written operands in the order of the op's schema."""
    results: list[Any] = []
    count = iter(counts)
    for fresh, place in zip(op.new, op.written, strict=True):
        if fresh:
            several = next(count)
            results.append(next(new) if several is None else [next(new) for _ in range(several)])
        else:
            results.append(args[place] if isinstance(place, int) and place < len(args) else kwargs.get(str(place)))
    return None if not results else results[0] if len(results) == 1 else tuple(results)


def _bring(
    op: Op, signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Move operands in the host's memory to the device where PyTorch allows them there; else refuse as it does."""
    if device_of(signature.foreign[0]).type == DEVICE:
        raise RuntimeError(
            f"{op.name} of a part of a storage of the pool device. Take parts of tensors, not of storages."
        )
    if signature.session is None or not op.name.startswith(INDEXING):
        here = cuda.name(signature.session.index if signature.session else 0)
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {here} and "
            f"{signature.foreign[0].device}! (when calling {op.name}). Move it first: .to('{here}')."
        )

    def move(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [move(element) for element in value]
        if any(value is foreign for foreign in signature.foreign):
            return value.to(torch.device(DEVICE, signature.session.index))
        return value

    return tuple(move(value) for value in args), {name: move(value) for name, value in kwargs.items()}


# --- special ops: bytes in and out, storages -----------------------------------------------------------------------


def copy_(target: Tensor, source: Tensor | complex, non_blocking: bool = False) -> Tensor:
    """Copy between the pool and the host's memory, or within the pool."""
    if target is source:
        return target
    if not isinstance(source, Tensor):  # PyTorch hands a number on as what it was in Python
        return target.fill_(source)
    there, here = device_of(target).type == DEVICE, device_of(source).type == DEVICE
    if there and here and device_of(target) != device_of(source):
        return copy_(target, _across(source, device_of(target)))
    if there and here:
        return call(_COPY, (target, source), {})  # type: ignore[no-any-return]
    if there:
        return _upload(target, source)
    fits = target.dtype == source.dtype and target.shape == source.shape and target.is_contiguous()
    if fits and not target.is_neg() and not target.is_conj():
        _download(source, target.detach())
    else:
        target.copy_(_download(source))
    return target


def _across(source: Tensor, device: torch.device) -> Tensor:
    """Return a copy on another device of the lease; the bytes go from worker to worker."""
    if source.numel() == 0:
        return torch.empty_like(source, device=device)
    remote = remote_of(source)
    if remote is None or not _is_all(source, remote):
        source = call(_CLONE, (source,), {})
        remote = remote_of(source)
    assert remote is not None
    session: Session = remote.session
    other = open_session(device.index)
    dtype, sizes, strides, _ = remote.geometry
    name, ticket = codec.DTYPE_NAMES[dtype], secrets.token_bytes(16)
    what = f"the copy of {name}{list(sizes)} from {cuda.name(session.index)} to {cuda.name(other.index)}"
    with session.lock:
        session.raise_failure()
        session.issue(wire.Send(remote.handle, other.index, ticket), what)
        session.flush()
    with other.lock:
        other.raise_failure()
        handle = other.new_handles(1)
        copy = Mold(dtype, sizes, strides, other.index).cast(other, handle)
        other.issue(wire.Receive(handle, session.index, ticket, wire.Geometry(name, tuple(sizes), strides)), what)
    return copy


def _is_all(tensor: Tensor, remote: Remote) -> bool:
    """Whether a tensor is its storage as it was made, with no gaps."""
    return (
        (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()) == remote.geometry
        and tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _upload(target: Tensor, source: Tensor) -> Tensor:
    if source.device.type != "cpu":
        source = source.cpu()
    source = source.detach().resolve_conj().resolve_neg().expand(target.shape)
    remote = remote_of(target)
    if target.dtype == source.dtype and remote is not None and _is_whole(target):
        _send(remote, source.contiguous(), target)
        return target
    # Elsewhere the bytes land in a tensor of their own, and the device copies, converts and broadcasts.
    staged = torch.empty(source.shape, dtype=source.dtype, device=device_of(target))
    return copy_(target, _upload(staged, source))


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all of its storage, in order."""
    return (
        tensor.is_contiguous()
        and tensor.storage_offset() == 0
        and tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _send(remote: Remote, source: Tensor, target: Tensor) -> None:
    """Send the bytes of `source` to a target that is all of its storage: small ones in the batch, others by payload."""
    if source.numel() == 0:
        return
    session: Session = remote.session
    name, data = codec.DTYPE_NAMES[source.dtype], _memory(source)
    what = f"the upload of {name}{list(source.shape)}"
    if len(data) <= wire.MAX_INLINE_BYTES and (target.dtype, target.shape, target.stride(), 0) == remote.geometry:
        with session.lock:
            session.issue(wire.Put(remote.handle, name, tuple(target.shape), bytes(data)), what)
    else:
        session.write(remote.handle, data, what)


def _download(source: Tensor, result: Tensor | None = None) -> Tensor:
    """Return a tensor's values in the host's memory: in `result`, a contiguous tensor like it, if there is one.

    New memory costs as much as the network, where the kernel makes it in small pages (half a second for 1 GiB).
    `Tensor.cpu` comes with memory that PyTorch has just made.
    """
    if result is None:
        result = torch.empty(source.shape, dtype=source.dtype)
    if source.numel() == 0:
        return result
    remote = remote_of(source)
    if remote is None or not _is_whole(source):
        source = call(_CLONE, (source,), {"memory_format": torch.contiguous_format})
        remote = remote_of(source)
    assert remote is not None
    use_huge_pages(result)
    memory = _memory(result)
    what = f"the reading of {codec.DTYPE_NAMES[source.dtype]}{list(source.shape)}"
    session: Session = remote.session
    starts = range(0, len(memory), wire.MAX_PAYLOAD_BYTES)
    reads: list[wire.Item] = [
        wire.Read(remote.handle, start, min(wire.MAX_PAYLOAD_BYTES, len(memory) - start)) for start in starts
    ]
    if sum(len(payload) for _, payload in session.requests(reads, wire.Data, what, memory)) != len(memory):
        raise WireError("the worker sent another number of bytes than it was asked for")
    return result


def _memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in the host's memory, without copying."""
    # One number alone may have any stride, and yet be contiguous.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def local_scalar_dense(tensor: Tensor) -> Any:
    """Return the value of a tensor with one element."""
    return _download(tensor).item()


def resize_(tensor: Tensor, sizes: Any, *, memory_format: torch.memory_format | None = None) -> Tensor:
    """Resize by a memory format."""
    layout = torch.empty(tuple(sizes), device="meta", memory_format=memory_format or torch.contiguous_format)
    return resize(tensor, tuple(sizes), layout.stride())


def resize(tensor: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Give a tensor other sizes; its storage grows if it must, and keeps what it has."""
    span = codec.span(sizes, strides, int(tensor.storage_offset()))
    storage = tensor.untyped_storage()
    if span * tensor.itemsize > storage.nbytes():
        device = device_of(tensor)
        grown = torch.empty(span, dtype=tensor.dtype, device=device)
        held = storage.nbytes() // tensor.itemsize
        if held:
            whole = set_storage(torch.empty(0, dtype=tensor.dtype, device=device), storage, 0, (held,), (1,))
            grown[:held].copy_(whole)
        storage = grown.untyped_storage()
    return set_storage(tensor, storage, int(tensor.storage_offset()), sizes, strides)


def to_copy(tensor: Tensor, **options: Any) -> Tensor:
    """Copy to another device or dtype. Always blocking: PyTorch's own would read into pinned memory otherwise."""
    device = options.get("device") or device_of(tensor)
    kept = {name: options[name] for name in ("dtype", "memory_format") if options.get(name) is not None}
    if device == device_of(tensor):
        return call(_TO_COPY, (tensor,), kept)  # type: ignore[no-any-return]
    if device.type == device_of(tensor).type == DEVICE:
        return _across(call(_TO_COPY, (tensor,), kept) if kept else tensor, device)
    memory_format = options.get("memory_format") or torch.preserve_format
    target = torch.empty_like(tensor, dtype=options.get("dtype"), device=device, memory_format=memory_format)
    return copy_(target, tensor)


def zero_tensor(sizes: Any, **options: Any) -> Tensor:
    """Return zeros that exist, in place of autograd's that do not."""
    return torch.zeros(sizes, **options)


def set_source_tensor(tensor: Tensor, source: Tensor) -> Tensor:
    """`set_(source)`."""
    return set_storage(
        tensor, source.untyped_storage(), int(source.storage_offset()), tuple(source.shape), source.stride()
    )


def set_nothing(tensor: Tensor) -> Tensor:
    """`set_()`: an empty tensor."""
    return set_source_tensor(tensor, torch.empty(0, dtype=tensor.dtype, device=device_of(tensor)))


def set_source_storage(tensor: Tensor, source: Any) -> Tensor:
    """`set_(storage)`."""
    return set_storage(tensor, source, 0, (source.nbytes() // tensor.itemsize,), (1,))


def embedding_bag_backward(grad: Tensor, indices: Tensor, offsets: Tensor, of_index: Tensor, *rest: Any) -> Tensor:
    """Return the gradient of an `embedding_bag`; a sparse one is made here, as the worker can hold dense ones only."""
    sizes, _, weights, by_frequency, mode, sparse, per_sample, *padding = rest
    if not sparse:
        return call(_BAG_BACKWARD, (grad, indices, offsets, of_index, *rest), {})  # type: ignore[no-any-return]
    if not of_index.numel():  # the host's kernel leaves out which bag an index is of where it can do without
        counts = offsets.new_zeros(indices.numel() + 1).index_add_(0, offsets, torch.ones_like(offsets))
        of_index = (counts.cumsum(0)[:-1] - 1).to(indices.dtype)
    return aten._embedding_bag_sparse_backward(  # type: ignore[no-any-return]
        grad, indices, offsets, of_index, sizes, weights, by_frequency, mode, per_sample, *padding
    )


def _on_cpu_key(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """Return PyTorch's own kernel for views: it only looks at sizes and strides, never at memory."""
    kernel, key = op._op_dk, torch._C.DispatchKey.CPU
    return lambda *args, **kwargs: kernel(key, *args, **kwargs)


VIEWS = ("as_strided", "view", "_reshape_alias", "unfold", "view_as_real", "view_as_complex")
SPECIAL: dict[str, Callable[..., Any]] = {
    **{name: _on_cpu_key(getattr(aten, name).default) for name in VIEWS},
    "set_.source_Storage_storage_offset": set_storage,
    "set_.source_Tensor": set_source_tensor,
    "set_.source_Storage": set_source_storage,
    "set_": set_nothing,
    "copy_": copy_,
    "_copy_from": lambda source, target, non_blocking=False: copy_(target, source),
    "_copy_from_and_resize": lambda source, target: copy_(resize_(target, source.shape), source),
    "resize_": resize_,
    "_local_scalar_dense": local_scalar_dense,
    "_embedding_bag_backward": embedding_bag_backward,
    "_to_copy": to_copy,
    "_efficientzerotensor": zero_tensor,
    "_lazy_clone": lambda tensor: tensor.clone(),
    "record_stream": lambda tensor, stream: None,
}
"""Kernels of their own: bytes cross here, or storages change hands."""

COMPOSED = {
    *("lift", "lift_fresh", "empty_like", "new_empty", "new_empty_strided", "resize_as_"),
    *("alias", "detach", "detach_", "view", "select", "slice", "diagonal", "expand", "permute"),
    *("squeeze", "unsqueeze", "t", "transpose", "split", "split_with_sizes", "unbind", "_conj", "_neg_view"),
    *("is_same_size", "is_coalesced", "dense_dim", "sparse_dim"),
    "_to_sparse",  # by `sparse`
    *("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "conv_tbc"),  # by `shims`
    "_pack_padded_sequence",  # its lengths are in the host's memory, and decide what comes out
}
"""Ops that PyTorch itself composes of others, and should: views, and what asks only for metadata."""

_COPY = Op(aten.copy_.default)
_TO_COPY = Op(aten._to_copy.default)
_CLONE = Op(aten.clone.default)
_BAG_BACKWARD = Op(aten._embedding_bag_backward.default)


def register(library: torch.library.Library) -> None:
    """Give every op that a worker runs a kernel for the pool device; PyTorch composes others of them, or refuses."""
    for name, kernel in SPECIAL.items():
        library.impl(name, kernel, "PrivateUse1")  # type: ignore[no-untyped-call]
    for dispatch_key in ("PrivateUse1", "AutogradPrivateUse1"):
        library.impl("scaled_dot_product_attention", attention, dispatch_key)  # type: ignore[no-untyped-call]
    for full in sorted(allowed()):
        name = full.removeprefix("aten::")
        base, _, overload = name.partition(".")
        if name not in SPECIAL and base not in COMPOSED:
            kernel = _kernel(getattr(getattr(aten, base), overload or "default"))
            kernel = _warning_of_bytes(kernel) if base in MASKING else kernel
            library.impl(name, kernel, "PrivateUse1")  # type: ignore[no-untyped-call]


def _kernel(overload: torch._ops.OpOverload) -> Callable[..., Any]:
    op: Op | None = None

    def kernel(*args: Any, **kwargs: Any) -> Any:
        nonlocal op
        if op is None:
            op = Op(overload)
        return call(op, args, kwargs)

    return kernel


def _warning_of_bytes(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel that warns of masks of bytes, as PyTorch's own do."""

    def indexing(tensor: Tensor, indices: Sequence[Tensor | None], *rest: Any, **options: Any) -> Any:
        for index in indices:
            if index is not None and index.dtype is torch.uint8:
                what = "indexing with dtype torch.uint8 is now deprecated, please use a dtype torch.bool instead."
                warnings.warn(what, UserWarning, stacklevel=2)
        return kernel(tensor, indices, *rest, **options)

    return indexing


def no_session(index: int) -> Session:
    """Say that there is no lease."""
    raise LeaseError("this process has no lease. Start the program with: millpond pool run -- COMMAND")


open_session = no_session
