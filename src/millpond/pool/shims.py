"""Where PyTorch asks the C++ of a device for what one made in Python cannot give: the same, in Python.

Each is here because a program would otherwise fail, or the process end. None changes what happens on other devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.parameter import Parameter, UninitializedParameter

from millpond.pool.tensors import DEVICE, device_of, remote_of, storage_device_of

Tensor = torch.Tensor

_new_storage: Callable[..., torch.UntypedStorage] = torch.UntypedStorage.__new__
_write_storage: Callable[..., None] = torch.UntypedStorage._write_file
_read_storage: Callable[..., torch.UntypedStorage] = torch.UntypedStorage._set_from_file
_synchronize: Callable[..., None] = torch.accelerator.synchronize
_negative_view: Callable[..., Tensor] = torch._neg_view
_swap_tensors: Callable[..., None] = torch.utils.swap_tensors
_new_lazy: Callable[..., Tensor] = UninitializedParameter
_get_data: Callable[..., Tensor] = torch._C.TensorBase.data.__get__  # type: ignore[attr-defined]
_set_data: Callable[..., None] = torch._C.TensorBase.data.__set__  # type: ignore[attr-defined]
_profile: Callable[..., None] = torch.autograd.profiler.profile.__init__
_save_on_cpu: Callable[..., None] = torch.autograd.graph.save_on_cpu.__init__


def install(library: torch.library.Library) -> None:
    """Put all of them in place."""
    # Module.to would else make new parameters, and lose that two modules share one, as it never does for a GPU.
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.UntypedStorage.__new__ = new_storage  # type: ignore[method-assign,assignment]
    torch.UntypedStorage._write_file = write_storage  # type: ignore[method-assign,assignment]
    torch.UntypedStorage._set_from_file = read_storage  # type: ignore[method-assign,assignment]
    torch.accelerator.synchronize = synchronize
    torch.utils.swap_tensors = swap_tensors
    torch._neg_view = Tensor._neg_view = negative_view  # type: ignore[assignment,method-assign]
    Tensor.data = property(_get_data, set_data)  # type: ignore[assignment]
    torch.autograd.profiler.profile.__init__ = profile  # type: ignore[method-assign]
    torch.autograd.graph.save_on_cpu.__init__ = save_on_cpu  # type: ignore[method-assign]
    for name in ("to", "cpu", "cuda", "double", "float", "half", "bfloat16"):
        setattr(UninitializedParameter, name, lazy_conversion(name))
    for name, kernel in (("is_pinned", is_pinned), ("_pin_memory", pin_memory)):
        library.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
    # Its kernels take a program's word for too much to be on a worker's list, and it makes nested tensors.
    torch.backends.mha.set_fastpath_enabled(False)
    composed: dict[str, Callable[..., Any]] = {
        "_thnn_fused_lstm_cell": lstm_cell,
        "_thnn_fused_gru_cell": gru_cell,
        "_weight_norm": weight_norm,
        "conv_tbc": conv_tbc,
        **dict.fromkeys(("_nested_tensor_from_tensor_list", "_nested_tensor_from_mask", "_nested_from_padded"), nested),
    }
    for name, composition in composed.items():
        for key in ("PrivateUse1", "AutogradPrivateUse1"):
            library.impl(name, composition, key)  # type: ignore[no-untyped-call]
    library.impl("_jagged_to_padded_dense_forward", jagged_to_padded, "PrivateUse1")  # type: ignore[no-untyped-call]
    library.impl("_padded_dense_to_jagged_forward", padded_to_jagged, "PrivateUse1")  # type: ignore[no-untyped-call]


def new_storage(cls: type[torch.UntypedStorage], *args: Any, device: Any = None, **kwargs: Any) -> torch.UntypedStorage:
    """Make a storage; PyTorch has no allocator for the pool, and would fall over that."""
    if device is None or torch.device(device).type != DEVICE:
        return _new_storage(cls, *args, device=device, **kwargs)
    content = args[0] if args else 0
    if isinstance(content, int):
        return torch.empty(content, dtype=torch.uint8, device=device).untyped_storage()
    return torch.tensor(content, dtype=torch.uint8).to(device).untyped_storage()


def write_storage(storage: torch.UntypedStorage, *args: Any) -> None:
    """Write a storage to a file in the old format (as pickling a tensor does); PyTorch would read its address."""
    if storage_device_of(storage).type == DEVICE:
        storage = torch.UntypedStorage(storage.nbytes()).copy_(storage)  # type: ignore[no-untyped-call]
    _write_storage(storage, *args)


def read_storage(storage: torch.UntypedStorage, *args: Any) -> torch.UntypedStorage:
    """Read a storage from such a file."""
    if storage_device_of(storage).type != DEVICE:
        return _read_storage(storage, *args)
    host: Any = torch.UntypedStorage(storage.nbytes())  # type: ignore[no-untyped-call]
    _read_storage(host, *args)
    storage.copy_(host)
    return storage


def synchronize(device: Any = None, /) -> None:
    """Wait for the accelerator."""
    named = DEVICE if device is None or isinstance(device, int) else device
    if torch.device(named).type in (DEVICE, "cuda"):
        torch.get_device_module(DEVICE).synchronize(device)
    else:
        _synchronize(device)


def lazy_conversion(name: str) -> Callable[..., Tensor]:
    """Return a conversion for lazy parameters whose result is a plain tensor, as `Module.to` wants it, always."""

    def convert(parameter: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = getattr(Tensor, name)(parameter, *args, **kwargs)
        return parameter.data if result is parameter else result

    return convert


def swap_tensors(one: Tensor, other: Tensor) -> None:
    """Swap two tensors, as `Module.to` does; PyTorch would ask a lazy module's parameter for its gradient.

    It also refuses one that a compiled model or a graph refers to, and loses its attributes and hooks; for a GPU, it
    sets `data`, and does neither.
    """
    if isinstance(one, UninitializedParameter):
        moved = _new_lazy(one.requires_grad, device=device_of(other), dtype=other.dtype)
        torch._C._swap_tensor_impl(one, moved)
    elif isinstance(one, Parameter) or {type(one), type(other)} == {Tensor}:
        _become(one, other)
    else:
        _swap_tensors(one, other)


def negative_view(tensor: Tensor) -> Tensor:
    """Return a view that negates lazily; calls look from then on whether operands in the same storage do."""
    if (remote := remote_of(tensor)) is not None:
        remote.negated = True
    return _negative_view(tensor)


def set_data(tensor: Tensor, value: Tensor) -> None:
    """Set `data`, across devices as well: `parameter.data = parameter.data.cuda()`. A gradient goes along."""
    if (device_of(tensor).type == DEVICE) is (device_of(value).type == DEVICE):
        _set_data(tensor, value)
        return
    gradient = tensor.grad if tensor.is_leaf else None
    _become(tensor, value.detach().requires_grad_(tensor.requires_grad))
    if gradient is not None:
        tensor.grad = gradient.to(value.device)


def _become(tensor: Any, other: Tensor) -> None:
    """Have a tensor be what another one is; it stays the object that it was, with its attributes and hooks."""
    hooks, after_gradient = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    if tensor.is_leaf and tensor.requires_grad and tensor._use_count() > 1:  # a graph refers to what it was
        torch.autograd.graph.get_gradient_edge(tensor).node.register_prehook(_moved_since)
    torch._C._swap_tensor_impl(tensor, other)
    tensor._backward_hooks, tensor._post_accumulate_grad_hooks = hooks, after_gradient


def _moved_since(gradients: Any) -> None:
    raise RuntimeError(
        "a parameter was moved to another device between the forward and the backward pass, so that its gradient has "
        "no place to go. Move the model before the forward pass."
    )


def profile(self: Any, enabled: bool = True, *, use_cuda: bool = False, use_device: Any = None, **kwargs: Any) -> None:
    """Start to profile: this process, as the kernels of a GPU run in the worker's."""
    _profile(self, enabled, use_device=None if use_device in (DEVICE, "cuda") else use_device, **kwargs)


def save_on_cpu(self: Any, pin_memory: bool = False, device_type: str = DEVICE) -> None:
    """Keep what the backward pass needs in the host's memory, of which none is pinned: see `pin_memory`."""
    _save_on_cpu(self, False, device_type)


def pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    """Return a copy that counts as pinned. Uploads go from any memory to the socket; none is better than another."""
    pinned = tensor.clone()
    pinned.untyped_storage().pinned = True  # type: ignore[attr-defined]
    return pinned


def is_pinned(tensor: Tensor, device: Any = None) -> bool:
    """Return whether a tensor came from `pin_memory`."""
    return getattr(tensor.untyped_storage(), "pinned", False)


def lstm_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    cell: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute an LSTM's step as PyTorch's CPU does; it takes the fused one, which a CPU worker lacks, for a GPU's."""
    gates = _biased(input_gates, input_bias) + _biased(hidden_gates, hidden_bias)
    into, forget, fresh, out = gates.chunk(4, 1)
    cell = forget.sigmoid() * cell + into.sigmoid() * fresh.tanh()
    return out.sigmoid() * cell.tanh(), cell, gates.new_empty(0)


def weight_norm(direction: Tensor, length: Tensor, dim: int = 0) -> Tensor:
    """Return a weight of that direction and length, as PyTorch's fused kernel does, which is on no worker's list."""
    return direction * (length / torch.norm_except_dim(direction, 2, dim))


def conv_tbc(x_TBC: Tensor, weight_KCD: Tensor, bias: Tensor, pad: int = 0) -> Tensor:
    """Convolve over time, which comes first; PyTorch's own kernel for that is on no worker's list."""
    y_BDT = torch.conv1d(x_TBC.permute(1, 2, 0), weight_KCD.permute(2, 1, 0), bias, padding=pad)
    return y_BDT.permute(2, 0, 1)


def nested(*args: Any, **kwargs: Any) -> Tensor:
    """Refuse a nested tensor of the older kind: the process would end when it takes part in autograd."""
    raise NotImplementedError(
        "nested tensors of the strided layout are not on the pool device. Make them with layout=torch.jagged."
    )


def jagged_to_padded(
    values_ND: Tensor, offsets: Sequence[Tensor], max_lengths: Sequence[int], padding_value: float = 0.0
) -> Tensor:
    """Return rows of several lengths in one padded tensor [B, T, D], of ops that a worker runs."""
    (ends,), (longest,) = offsets, max_lengths
    rows_BT = ends[:-1, None] + torch.arange(longest, device=ends.device)
    if not len(values_ND):
        return values_ND.new_full((*rows_BT.shape, *values_ND.shape[1:]), padding_value)
    padded_BTD = values_ND[rows_BT.clamp(max=len(values_ND) - 1)]
    past_BT = rows_BT >= ends[1:, None]
    return padded_BTD.masked_fill(past_BT.reshape(*rows_BT.shape, *(1,) * (values_ND.dim() - 1)), padding_value)


def padded_to_jagged(dense_BTD: Tensor, offsets: Sequence[Tensor], total_L: int | None = None) -> Tensor:
    """Return the rows of a padded tensor that are none of its padding, one after another [N, D]."""
    (ends,) = offsets
    rows_N = torch.arange(int(ends[-1]) if total_L is None else total_L, device=ends.device)
    of_N = torch.searchsorted(ends, rows_N, right=True) - 1
    place_N = rows_N - ends[of_N]
    last = dense_BTD.size(1) - 1  # where it was padded to less than the longest row has, the rest is zero
    kept_ND = dense_BTD[of_N, place_N.clamp(max=last)]
    return kept_ND.masked_fill((place_N > last).reshape(-1, *(1,) * (kept_ND.dim() - 1)), 0)


def gru_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    hidden: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute a GRU's step as PyTorch's CPU does."""
    of_input = _biased(input_gates, input_bias).chunk(3, 1)
    of_hidden = _biased(hidden_gates, hidden_bias).chunk(3, 1)
    reset = (of_hidden[0] + of_input[0]).sigmoid()
    update = (of_hidden[1] + of_input[1]).sigmoid()
    fresh = (of_input[2] + of_hidden[2] * reset).tanh()
    return (hidden - fresh) * update + fresh, hidden.new_empty(0)


def _biased(gates: Tensor, bias: Tensor | None) -> Tensor:
    return gates if bias is None else gates + bias
