"""Sparse tensors and sparse gradients on the pool device give what they give on the host."""

from __future__ import annotations

import pytest

PROGRAM = """
import torch
torch.set_num_threads(1)
torch.sparse.check_sparse_tensor_invariants.enable()

def alike(there, host):
    assert there.device.type == "pool" and host.device.type == "cpu", (there.device, host.device)
    torch.testing.assert_close(there.to_dense().cpu(), host.to_dense())

indices, values = torch.tensor([[2, 0, 1, 2], [3, 2, 0, 3]]), torch.tensor([3.0, 4, 5, 6])
host = torch.sparse_coo_tensor(indices, values, (3, 4))
there = torch.sparse_coo_tensor(indices.to("pool"), values.to("pool"), (3, 4))
alike(there, host)
alike(host.to("pool"), host)
alike(there.coalesce(), host.coalesce())
assert torch.equal(there.coalesce().indices().cpu(), host.coalesce().indices())
assert there.coalesce().is_coalesced() and not there.is_coalesced()
assert torch.equal(there.cpu().to_dense(), host.to_dense())
dense = torch.rand(3, 4)
for function in (
    lambda s, d: s * 2, lambda s, d: s / 2, lambda s, d: -s, lambda s, d: s + s, lambda s, d: d + s,
    lambda s, d: torch.sparse.mm(s, d.t()), lambda s, d: torch.sparse.addmm(d @ d.t(), s, d.t()),
    lambda s, d: s @ d.t(), lambda s, d: d.sparse_mask(s.coalesce()), lambda s, d: s.clone().mul_(3),
    lambda s, d: s.clone().zero_(), lambda s, d: s.double(), lambda s, d: torch.sparse.sum(s, 0), lambda s, d: s.t(),
):
    alike(function(there, dense.to("pool")), function(host, dense))
one, two = torch.empty(0, 2, dtype=torch.int64), torch.rand(2, 3)  # two values for one place
alike(torch.sparse_coo_tensor(one.to("pool"), two.to("pool"), (3,)).coalesce(), torch.sparse_coo_tensor(one, two, (3,)))
alike(torch.sparse_coo_tensor(one.to("pool"), two.to("pool"), (3,)), torch.sparse_coo_tensor(one, two, (3,)))
alike(torch.ones(3, device="pool").sparse_mask(torch.sparse_coo_tensor(one, two, (3,), device="pool")),
      torch.ones(3).sparse_mask(torch.sparse_coo_tensor(one, two, (3,)).coalesce()) * 2)
grown = torch.ones(3, device="pool").add_(torch.sparse_coo_tensor(one, two, (3,), device="pool"))
torch.testing.assert_close(grown.cpu(), 1 + two.sum(0))
learned = two.to("pool").requires_grad_()
torch.sparse_coo_tensor(one, learned, (3,), device="pool").coalesce().values().sum().backward()
assert torch.equal(learned.grad.cpu(), torch.ones(2, 3))
for number in (torch.tensor(0.0), torch.tensor(2.0)):
    assert number.to("pool").to_sparse(0).values().cpu().equal(number.to_sparse(0).values())
for wrong in (0, 3, -1):
    try:
        dense.to("pool").to_sparse(wrong)
    except RuntimeError as error:
        assert "sparse_dim must be in 1..2" in str(error), error
    else:
        raise AssertionError(wrong)
assert there.coalesce().norm().item() == host.coalesce().norm().item()
assert "sparse_coo" in repr(there)

for optimizer in (torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad):
    weights = []
    for device in ("cpu", "pool"):
        torch.manual_seed(1)
        table = torch.nn.Embedding(50, 8, sparse=True).to(device)
        bag = torch.nn.EmbeddingBag(50, 8, sparse=True, mode="sum").to(device)
        steps = optimizer([*table.parameters(), *bag.parameters()], lr=0.1)
        batches = torch.Generator().manual_seed(2)
        for _ in range(10):
            ids = torch.randint(0, 50, (4, 6), generator=batches).to(device)
            steps.zero_grad()
            (table(ids).square().sum() + bag(ids).square().sum()).backward()
            assert table.weight.grad.layout is torch.sparse_coo
            steps.step()
        weights.append(torch.cat([table.weight, bag.weight]).detach().cpu())
    torch.testing.assert_close(weights[1], weights[0])
"""


@pytest.mark.slow
def test_sparse_tensors_and_gradients_give_what_they_give_on_the_host(worker):
    done = worker.run(PROGRAM)
    assert done.returncode == 0, done.stderr


def compare_optimizers():
    import torch

    torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud, or PyTorch warns
    for optimizer_class in (torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad):
        weights = []
        for device in ("cpu", "pool"):
            torch.manual_seed(0)
            embedding = torch.nn.Embedding(5, 3, sparse=True, padding_idx=4).to(device)
            optimizer = optimizer_class(embedding.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                for ids in ([1, 1, 2], [3, 4]):  # the second gradient is added to the first
                    embedding(torch.tensor(ids, device=device)).pow(2).sum().backward()
                assert embedding.weight.grad.is_sparse
                assert embedding.weight.grad.device.type == device
                optimizer.step()
            weights.append(embedding.weight.detach().cpu())
        torch.testing.assert_close(weights[1], weights[0])


def compare_conversions():
    import torch

    torch.sparse.check_sparse_tensor_invariants.disable()  # said aloud, or PyTorch warns
    indices, values = torch.tensor([[0, 2, 2], [1, 0, 0]]), torch.arange(6.0).reshape(3, 2)
    host = torch.sparse_coo_tensor(indices, values, (3, 3, 2))
    there = torch.sparse_coo_tensor(indices.to("pool"), values.to("pool"), (3, 3, 2))
    assert torch.equal(host.to("pool").cpu().to_dense(), host.to_dense())
    for number, work in enumerate(
        (
            lambda t: t,
            lambda t: t.coalesce(),
            lambda t: t + 2 * t,
            lambda t: (t - t / 2).coalesce().abs(),
            lambda t: t.to_dense() + t,
            lambda t: t.to_dense().to_sparse(),
            lambda t: t.to_dense().to_sparse(1),
            lambda t: torch.ones(3, 3, 2, device=t.device).sparse_mask(t.coalesce()),
            lambda t: torch.sparse.sum(t),
            lambda t: torch.sparse.mm(t.to_dense()[..., 1].to_sparse(), torch.eye(3, device=t.device)),
            lambda t: t.clone().zero_(),
        )
    ):
        expected, found = work(host), work(there)
        assert (found.layout, found.device.type) == (expected.layout, "pool")
        assert expected.layout is torch.strided or found.coalesce()._nnz() == expected.coalesce()._nnz(), number
        assert torch.equal(found.to_dense().cpu(), expected.to_dense())


def refuse_other_layouts():
    import pytest
    import torch

    with pytest.raises(
        NotImplementedError, match=r"sparse tensors of layout sparse_coo, and none of torch[.]sparse_csr"
    ):
        torch.eye(3, device="pool").to_sparse(layout=torch.sparse_csr)


def test_optimizers_take_sparse_gradients_as_on_the_host(device_process):
    device_process.call(compare_optimizers)


def test_sparse_tensors_are_made_summed_and_moved_as_on_the_host(device_process):
    device_process.call(compare_conversions)


def test_another_layout_is_refused_with_what_there_is(device_process):
    device_process.call(refuse_other_layouts)
