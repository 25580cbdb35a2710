"""Copies between the devices of a lease: from worker to worker, whole, in order, and never through the client."""

from __future__ import annotations

import pytest
import torch

from millpond.pool import wire
from worker_site import PEER_TOKEN, WorkerProcess, Workers, run


def test_copies_keep_values_dtypes_strides_and_views(two_devices):
    def program():
        whole = torch.randn(64, 3, 20, 30, device="cuda:0")
        last = whole.to(memory_format=torch.channels_last)
        complex_ = torch.view_as_complex(torch.randn(5, 2, device="cuda:0"))
        for source in (
            whole,
            last,
            whole[3:9, :, ::2].transpose(0, 3),
            whole[1, 2, 3, 4],
            whole[0:0],
            complex_.conj(),
            complex_.conj().imag,
            torch.arange(7, device="cuda:0").bool(),
            whole.bfloat16(),
            torch.zeros(1, device="cuda:0").expand(4, 5),
        ):
            copy = source.to("cuda:1")
            assert copy.device == torch.device("cuda", 1)
            assert torch.equal(copy.cpu(), source.cpu())
            assert copy.stride() == source.cpu().clone().stride() or source.stride() == (0, 0)
        assert last.to("cuda:1").is_contiguous(memory_format=torch.channels_last)
        halved = whole.to("cuda:1", torch.float16)
        assert torch.equal(halved.cpu(), whole.cpu().half())
        target = torch.zeros(4, 4, device="cuda:1")
        target.t()[1:3] = whole[0, 0, :2, :4].half()
        expected = torch.zeros(4, 4)
        expected.t()[1:3] = whole[0, 0, :2, :4].cpu().half().float()
        assert torch.equal(target.cpu(), expected)

    two_devices.call(program)


def test_what_is_written_after_a_copy_is_not_in_it(two_devices):
    def program():
        source = torch.zeros(1 << 16, device="cuda:0")
        copies = []
        for _ in range(50):
            copies.append(source.to("cuda:1"))
            source.add_(1)
        assert [copy.mean().item() for copy in copies] == [float(n) for n in range(50)]

    two_devices.call(program)


def test_two_threads_that_copy_towards_each_other_never_wait_for_each_other(two_devices):
    def program():
        import threading

        def bounce(here, there):
            tensor = torch.ones(1 << 20, device=here)
            for _ in range(8):
                tensor = tensor.to(there).add_(1).to(here)
            sums.append(tensor.mean().item())

        sums = []
        ends = (("cuda:0", "cuda:1"), ("cuda:1", "cuda:0"), ("cuda:0", "cuda:1"))
        threads = [threading.Thread(target=bounce, args=two) for two in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sums == [9.0] * 3

    two_devices.call(program)


def test_a_copy_does_not_pass_through_the_client(two_devices):
    def program():
        from millpond.pool import transport

        source = torch.ones(1 << 20, device="cuda:0")
        source.to("cuda:1").sum().item()
        crossed = []

        def count(name):
            method = getattr(transport.Connection, name)

            def counting(self, *args, **kwargs):
                result = method(self, *args, **kwargs)
                if name == "send":
                    crossed.append(len(transport.wire.encode(args[0])) + sum(map(len, args[1:])))
                else:
                    crossed.append(len(transport.wire.encode(result[0])) + len(result[1]))
                return result

            setattr(transport.Connection, name, counting)
            return method

        methods = {name: count(name) for name in ("send", "receive")}
        try:
            assert source.to("cuda:1").sum().item() == float(1 << 20)
        finally:
            for name, method in methods.items():
                setattr(transport.Connection, name, method)
        assert 0 < sum(crossed) < 1000

    two_devices.call(program)


def test_what_failed_before_a_copy_fails_at_both_ends_with_its_own_kind(two_devices):
    def program():
        table, missing = torch.ones(3, 3, device="cuda:0"), torch.tensor([99], device="cuda:0")
        copy = torch.nn.functional.embedding(missing, table).to("cuda:1")
        with pytest.raises(IndexError, match=r"out of range[\s\S]*the copy of float32\[1, 3\] from cuda:0 to cuda:1"):
            copy.cpu()
        with pytest.raises(IndexError, match=r"aten::embedding"):
            torch.cuda.synchronize(0)
        assert torch.ones(2, device="cuda:0").to("cuda:1").sum().item() == 2

    two_devices.call(program)


def test_a_copy_that_does_not_fit_is_out_of_memory_at_the_receiver(two_devices):
    def program():
        full = torch.empty(900 * 2**18, device="cuda:1")
        source = torch.zeros(200 * 2**18, device="cuda:0")
        with pytest.raises(torch.OutOfMemoryError, match=r"the copy of float32\[52428800\] from cuda:0 to cuda:1"):
            source.to("cuda:1").sum().item()
        del full
        assert source[:9].to("cuda:1").sum().item() == 0

    two_devices.call(program)


@pytest.mark.slow
def test_a_worker_that_cannot_reach_another_ends_with_the_reason(tmp_path):
    log = tmp_path / "worker.log"
    worker = WorkerProcess(log=log, peer_token=PEER_TOKEN)
    try:
        here = wire.PeerAddress("127.0.0.1", worker.first_report.peer_port)
        worker.introduce(0, [here, wire.PeerAddress("127.0.0.1", 1)])
        assert worker.process.wait(30) == 1
        assert (
            "the worker of device 1 of this lease cannot be reached at 127.0.0.1:1 from that of device 0 at 127.0.0.1: "
            "nothing answers" in log.read_text()
        )
    finally:
        worker.close()


@pytest.mark.slow
def test_a_worker_that_is_gone_is_an_error_that_names_the_copy(tmp_path):
    workers = Workers(log=tmp_path / "worker")
    try:
        program = """
import contextlib, os, signal, socket, torch
from millpond.pool import kernels, wire
there = torch.ones(9, device="pool:0")
there.to("pool:1").sum().item()
other = torch.pool.workers[1]
os.kill(other.pid, signal.SIGKILL)
with contextlib.suppress(OSError):
    while True:
        socket.create_connection((other.host, other.port), timeout=9).close()
session = kernels.open_session(0)
with session.lock:
    session.issue(wire.Send(there.untyped_storage().remote.handle, 1, bytes(16)), "the copy of float32[9]")
try:
    there.sum().item()
    torch.pool.synchronize()
except Exception as error:
    print(type(error).__name__, error)
"""
        done = run(program, workers.environment(), 60)
        assert "OpError the worker of device 1 of this lease cannot be reached at 127.0.0.1:" in done.stdout, done
        assert "in the copy of float32[9]" in done.stdout
    finally:
        workers.close()
