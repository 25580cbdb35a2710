"""A call that does not fit its op fails at once on the pool device, and says what it says everywhere."""

from __future__ import annotations

import pytest
import torch

from pool.test_device import on_device


@on_device
def test_operands_that_do_not_fit_are_refused_at_once_in_the_words_of_pytorch():
    def complaints(device):
        a, n = torch.arange(12.0, device=device).reshape(3, 4), torch.arange(3, device=device)
        mask = torch.zeros(4, dtype=torch.bool, device=device)
        calls = (
            lambda: a.__setitem__(([0, 1], [0, 1, 2]), 0),
            lambda: a.index_put_((n,), torch.ones(5, device=device)),
            lambda: a.index_put_((n,), torch.ones((), dtype=torch.float64, device=device)),
            lambda: a.index_put_((mask,), torch.ones((), device=device)),
            lambda: a[n, n, n],
            lambda: a[[0, 1], [0, 1, 2]],
            lambda: a[:, :0][:, n],
            lambda: a[:, :0].index_put_((None, n), a[:, :0]),
            lambda: a[mask],
            lambda: torch.nonzero(a, out=torch.empty(0, device=device)),
            lambda: torch.masked_select(a, a > 1, out=torch.empty(0, dtype=torch.int64, device=device)),
            lambda: torch.clamp(a),
            lambda: torch.add(n, n, alpha=1.5),
            lambda: torch.sub(mask, mask, alpha=1.5),
            lambda: torch.add(mask, mask, alpha=1.5),
            lambda: a.add_(a, alpha=True),
            lambda: torch.rsub(a, a, alpha=1j),
            lambda: torch.add(n, 1, out=torch.empty(3, dtype=torch.bool, device=device)),
            lambda: torch.sqrt(n, out=torch.empty(3, dtype=torch.int64, device=device)),
            lambda: n.add_(1.5),
            *(lambda name=name: getattr(a[0], name)(a) for name in ("eq_", "pow_", "fmod_", "atan2_", "add_", "le_")),
            *(lambda name=name: getattr(a[:1], name)(a) for name in ("eq_", "ne_", "lt_", "gt_", "mul_")),
            lambda: a[0].masked_scatter_(a > 1, a),
            *(lambda name=name: getattr(a[:1].expand(3, 4), name)() for name in ("exp_", "bernoulli_", "normal_")),
            lambda: torch.add(a, 1, out=a[0].expand(3, 4)),
            lambda: a[0].expand(3, 4).copy_(a),
            lambda: a.masked_scatter_(a > 1, a.double()),
            lambda: a @ a,
            lambda: torch.cat([a, n]),
            lambda: torch.nn.functional.conv2d(a, a),
        )
        for call in calls:
            with pytest.raises(Exception, match=r".") as raised:
                call()
            kind = next(
                kind for kind in (IndexError, ValueError, TypeError, RuntimeError) if raised.errisinstance(kind)
            )
            yield kind, str(raised.value).partition("\n")[0]

    assert list(complaints("pool")) == list(complaints("cpu"))
    torch.pool.synchronize()  # nothing comes late
