"""Random chains of views and in-place writes: what shares storage on the host shares it on the pool."""


def compare_chains():
    import random
    import warnings

    import torch

    warnings.simplefilter("ignore")  # writes to expanded tensors are deprecated, and refused or done alike all the same

    views = [
        lambda t, r: t.t() if t.dim() == 2 else t.flip(0),
        lambda t, r: t[r.randrange(t.shape[0]) :] if t.dim() and t.shape[0] else t,
        lambda t, r: t[..., :: r.choice((1, 2))] if t.dim() else t,
        lambda t, r: t.select(-1, 0) if t.dim() and t.shape[-1] else t,
        lambda t, r: t.unsqueeze(r.randint(0, t.dim())),
        lambda t, r: t.expand(2, *t.shape),
        lambda t, r: t.squeeze(),
        lambda t, r: t.diagonal() if t.dim() > 1 else t.detach(),
        lambda t, r: t.reshape(-1),
        lambda t, r: t.permute(*r.sample(range(t.dim()), t.dim())),
        lambda t, r: t.unfold(0, 2, 1) if t.dim() and t.shape[0] > 1 else t,
        lambda t, r: t.chunk(2, -1)[-1] if t.dim() else t,
        lambda t, r: torch.view_as_real(torch.view_as_complex(t)) if t.is_contiguous() and t.shape[-1:] == (2,) else t,
    ]
    writes = [
        lambda t, r: t.add_(r.randint(1, 9)),
        lambda t, r: t.mul_(2),
        lambda t, r: t.copy_(t.flip(0)) if t.dim() else t.neg_(),
        lambda t, r: t.zero_(),
        lambda t, r: t.copy_(torch.arange(float(t.numel())).reshape(t.shape)),
        lambda t, r: t.masked_fill_(t > 5, 1.5),
        lambda t, r: t.__setitem__(..., r.random()),
        lambda t, r: t.index_fill_(0, torch.zeros(1, dtype=torch.long, device=t.device), 7) if t.dim() else t,
    ]
    for seed in range(40):
        ends = []
        for device in ("cpu", "pool"):
            choices = random.Random(seed)
            tensors = [torch.arange(24.0).reshape(4, 6).to(device)]
            outcome = []
            for _ in range(12):
                source = choices.choice(tensors)
                step = choices.choice(views + writes)
                state = choices.getstate()
                try:
                    result = step(source, choices)
                    if device == "pool":
                        torch.pool.synchronize()  # what the worker refuses is known only now
                    if step in views and result.numel() < 500:
                        tensors.append(result)
                        outcome.append((result.shape, result.stride(), result.storage_offset()))
                except (RuntimeError, IndexError):
                    outcome.append("refused")
                choices.setstate(state)
                choices.random()
            shared = [
                [a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a in tensors] for b in tensors
            ]
            ends.append((outcome, shared, [tensor.tolist() for tensor in tensors]))
        assert ends[0] == ends[1], seed
    warnings.simplefilter("error")


def test_random_chains_of_views_and_writes_agree_with_the_host(device_process):
    device_process.call(compare_chains)
