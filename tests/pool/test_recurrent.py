"""Recurrent layers by cuDNN: a CPU stands in for the GPU that has it (stand_in_gpu.py)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pool.conftest import DeviceProcess
from pool.stand_in_gpu import NAME
from worker_site import WorkerProcess


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceProcess]:
    """A process whose device says that it is a GPU."""
    log = tmp_path_factory.mktemp("worker") / "worker.log"
    command = [sys.executable, str(Path(__file__).with_name("stand_in_gpu.py"))]
    with (
        contextlib.closing(WorkerProcess(log=log, command=command, device=NAME)) as worker,
        contextlib.closing(DeviceProcess(worker)) as process,
    ):
        yield process


def test_a_layer_is_one_op_and_learns_as_on_the_host(gpu: DeviceProcess) -> None:
    def layers_learn_alike():
        import itertools
        import warnings

        import millpond.pool.kernels as kernels

        names = []
        issued = kernels.Session.issue

        def noting(session, item, what):
            names.append(str(what).partition("(")[0])
            return issued(session, item, what)

        kernels.Session.issue = noting
        warnings.filterwarnings("ignore", "LSTM with projections")
        nn = torch.nn
        kinds = [nn.RNN, nn.LSTM, nn.GRU, lambda *sizes, **more: nn.LSTM(*sizes, proj_size=2, **more)]
        kinds.append(lambda *sizes, **more: nn.RNN(*sizes, nonlinearity="relu", **more))
        for kind, packed, more in itertools.product(
            kinds,
            (False, True),
            ({"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}),
        ):
            torch.manual_seed(1)
            layer = kind(3, 5, **more)
            x = torch.randn(4, 6, 3)
            seen = []
            for device in ("cpu", "pool"):
                there = layer.to(device)
                names.clear()
                given = x.detach().to(device).requires_grad_()
                rows = given
                if packed:
                    first = more.get("batch_first", False)
                    lengths = [6, 5, 3, 1] if first else [4, 4, 3, 2, 1, 1]
                    rows = nn.utils.rnn.pack_padded_sequence(given, lengths, first)
                out, hidden = there(rows)
                out = out.data if packed else out
                last = hidden if isinstance(hidden, tuple) else (hidden,)
                loss = out.square().sum() + sum(each.sum() for each in last)
                gradients = torch.autograd.grad(loss, [given, *there.parameters()])
                seen.append([each.cpu() for each in (out.detach(), *last, *gradients)])
            torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)
            fused = [name for name in names if "rnn" in name]
            assert "aten::_cudnn_rnn" in fused, names
            assert "aten::_cudnn_rnn_backward" in fused, names
            assert not [name for name in names if "sigmoid" in name or "tanh" in name], names
        kernels.Session.issue = issued

    gpu.call(layers_learn_alike)


def test_dropout_has_one_state_autocast_casts_and_cudnn_can_be_turned_off(gpu: DeviceProcess) -> None:
    def draws_casts_and_composes():
        from millpond.pool import recurrent

        layer = torch.nn.LSTM(3, 5, num_layers=2, dropout=0.5).to("pool")
        x = torch.randn(4, 2, 3, device="pool")
        recurrent._dropout_states.clear()
        for _ in range(2):
            layer(x)[0].sum().backward()
            assert len(recurrent._dropout_states) == 1
        layer.eval()
        with torch.autocast("pool", torch.float16):
            assert layer(x.half())[0].dtype is torch.float16
        with torch.backends.cudnn.flags(enabled=False):
            expected = layer.cpu()(x.cpu())[0]
            torch.testing.assert_close(layer.to("pool")(x)[0].cpu(), expected, rtol=1e-4, atol=1e-5)

    gpu.call(draws_casts_and_composes)
