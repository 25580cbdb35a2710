"""Jobs on leased devices, with real brokers, hosts and workers; Ray is a stand-in or real (slow), Paddle a stand-in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from millpond.pool import job, job_worker, ray_jobs
from millpond.pool.errors import LeaseError, PoolError
from millpond.pool.worker import Orders
from millpond.settings import PoolSettings, SettingsError, load
from pool_site import BrokerProcess, HostProcess, wait_for
from ray_site import RAY_TOKEN, Ray, RayStandIn, free_ports, paddle_stand_in

MIB = 2**20
SAID = '{"a": 1}\n{"b": 2}\n'


@pytest.fixture(scope="module", params=["stand-in", pytest.param("real", marks=pytest.mark.slow)])
def ray(request: pytest.FixtureRequest) -> Iterator[RayStandIn | Ray]:
    with contextlib.closing(RayStandIn() if request.param == "stand-in" else Ray()) as started:
        yield started


@pytest.fixture
def stand_in() -> Iterator[RayStandIn]:
    with contextlib.closing(RayStandIn()) as started:
        yield started


def runs_jobs(tmp_path: Path, ray: RayStandIn | Ray, **environ: str) -> dict[str, str]:
    """Return the settings of a host that runs jobs."""
    return {
        "MILLPOND_POOL_RAY_ADDRESS": ray.address,
        "MILLPOND_POOL_RAY_TOKEN": RAY_TOKEN,
        "MILLPOND_POOL_PADDLE_PYTHON": str(paddle_stand_in(tmp_path)),
        "MILLPOND_POOL_MEMORY": "2GiB",
        **environ,
    }


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., BrokerProcess]]:
    """Start a broker that has a CPU, and runs jobs with a Ray."""
    with contextlib.ExitStack() as stack:

        def start(ray: RayStandIn | Ray, **environ: str) -> BrokerProcess:
            site = BrokerProcess(tmp_path / "pool", **runs_jobs(tmp_path, ray, **environ))
            stack.callback(site.close)
            return site

        yield start


@contextlib.contextmanager
def running(site: BrokerProcess, work: Path, what: dict[str, Any], **options: Any) -> Iterator[job.Job]:
    work.mkdir(exist_ok=True)
    (work / "job.json").write_text(json.dumps(what))
    with job.lease_job(site.settings, work, wait_s=20, **options) as started:
        started.start()
        yield started


def files(site: BrokerProcess) -> list[Path]:
    return list((site.home / "state/pool/jobs").glob("job-*"))


def pid(site: BrokerProcess) -> int:
    """Return the process of the job."""
    path = site.home / "state/pool/job.pid"
    return int(wait_for(lambda: path.exists() and path.read_text()))


def is_gone(process: int) -> bool:
    return not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE


def test_a_job_is_given_its_files_and_says_its_lines_and_leaves_nothing(ray, start, tmp_path):
    site, work = start(ray), tmp_path / "work"
    work.mkdir()
    (work / "weights.safetensors").write_bytes(b"w" * (9 * MIB))
    (work / "notes.txt").write_text("not for the job")
    what = {"says": SAID, "tells_files": True, "writes": {"trained.safetensors": 9 * MIB, "checkpoint.safetensors": 5}}
    with running(site, work, what) as started:
        assert (started.device, started.where.startswith("the pool's CPU")) == ("cpu", True)
        assert [json.loads(started.readline()) for _ in range(2)] == [{"a": 1}, {"b": 2}]
        told = json.loads(started.readline())
        assert told == {"job.json": len(json.dumps(what)), "weights.safetensors": 9 * MIB}
        assert [started.readline() for _ in range(2)] == [b"wrote", b"wrote"]
        assert started.fetch("trained.safetensors", 9 * MIB).read_bytes() == b"w" * (9 * MIB)
        started.fetch("checkpoint.safetensors", 5)
        started.drop("checkpoint.safetensors")
        assert not (work / "checkpoint.safetensors").exists()
        with pytest.raises(PoolError, match=r"checkpoint\.safetensors is missing"):
            started.fetch("checkpoint.safetensors", 5)
        with pytest.raises(PoolError, match="not of the size that it should have"):
            started.fetch("trained.safetensors", 9 * MIB - 1)
        started.stop()
        assert started.readline() == b"heard stop"
        process, (status, *_) = pid(site), site.status().leases
        assert (status.state, status.memory_bytes) == ("active", 2 * 2**30)
        assert len(files(site)) == 1
    site.wait_ended(status.lease)
    wait_for(lambda: site.status().devices[0].free_bytes == 2 * 2**30)
    assert is_gone(process)
    assert files(site) == []


def test_a_job_knows_no_secret_of_ray_and_of_the_pool_and_its_device(stand_in, start, tmp_path):
    site = start(stand_in, SECRET="of the host", OMP_NUM_THREADS="3")
    with running(site, tmp_path / "work", {"tells_environment": True}, memory_bytes=2**30) as started:
        told = json.loads(started.readline())
    assert (told["CUDA_VISIBLE_DEVICES"], told["OMP_NUM_THREADS"]) == ("", "3")
    assert RAY_TOKEN not in str(told)
    assert not [name for name in told if name.startswith(("RAY", "MILLPOND", "SECRET"))]
    (submitted,) = stand_in.submitted
    assert submitted["entrypoint_resources"] == {"node:127.0.0.1": 0.001}
    assert submitted["entrypoint"].startswith("ulimit -d 3145728 && exec env -i ")  # a GiB, and the workspace


def test_a_job_that_fails_is_told_without_what_the_host_is_like(ray, start, tmp_path):
    with running(start(ray), tmp_path / "work", {"exits": 3}) as started:
        assert started.readline() == b""
        assert started.why_ended() == "the job ended with exit status 3. It printed last: disc on fire"


def test_a_job_that_is_killed_is_told(ray, start, tmp_path):
    site = start(ray)
    with running(site, tmp_path / "work", {"says": SAID}) as started:
        started.readline()
        os.kill(pid(site), signal.SIGKILL)
        while started.readline():
            pass
        assert "was killed by SIGKILL (memory may have run out" in started.why_ended()


def test_a_lease_that_is_lost_ends_the_job_and_is_told(ray, start, tmp_path):
    site = start(ray)
    with running(site, tmp_path / "work", {"says": SAID}) as started:
        started.readline()
        process, (worker,) = pid(site), site.workers()
        worker.kill()
        while started.readline():
            pass
        assert f"is lost: worker {worker.pid} of device 0 was ended by SIGKILL" in started.why_ended()
        with pytest.raises(PoolError, match=r"the job has ended|is lost"):
            started.fetch("trained.safetensors", 9)
        wait_for(lambda: is_gone(process))
        wait_for(lambda: not files(site))


CLIENT = """
import sys
from pathlib import Path
from millpond.pool import job
from millpond.settings import PoolSettings, load
with job.lease_job(load(PoolSettings), Path(sys.argv[1])) as started:
    started.start()
    while line := started.readline():
        print(line.decode(), flush=True)
"""


@pytest.mark.slow
def test_a_client_that_is_killed_leaves_no_job(ray, start, tmp_path):
    site, work = start(ray), tmp_path / "work"
    work.mkdir()
    (work / "job.json").write_text(json.dumps({"says": SAID}))
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(work)], env=site.environ, stdout=subprocess.PIPE
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline()
        process = pid(site)
        client.kill()
    wait_for(lambda: is_gone(process))
    (status,) = site.status().leases
    site.wait_ended(status.lease)
    wait_for(lambda: site.status().devices[0].free_bytes == 2 * 2**30)
    assert files(site) == []


@pytest.mark.slow
def test_a_broker_that_is_killed_leaves_no_job_and_its_successor_clears_up(ray, start, tmp_path):
    site = start(ray)
    with running(site, tmp_path / "work", {"says": SAID}) as started:
        process = pid(site)
        site.kill()
        wait_for(lambda: is_gone(process))
        while started.readline():
            pass
        assert "is gone" in started.why_ended()
    assert len(files(site)) == 1
    again = start(ray)
    with running(again, tmp_path / "work", {"says": SAID}):
        assert len(files(again)) == 1


def test_a_break_of_the_network_is_a_pause(ray, start, tmp_path):
    with running(start(ray), tmp_path / "work", {"says": SAID, "writes": {"trained.safetensors": 9}}) as started:
        assert started.readline() == b'{"a": 1}'
        started._line.link.connection.socket.shutdown(socket.SHUT_RDWR)
        assert [started.readline() for _ in range(2)] == [b'{"b": 2}', b"wrote"]
        assert started.fetch("trained.safetensors", 9).stat().st_size == 9


def test_lines_that_nobody_reads_hinder_no_fetch(start, stand_in, tmp_path):
    what = {"says": ("x" * 1000 + "\n") * 3000, "writes": {"trained.safetensors": 9}}
    site = start(stand_in)
    with running(site, tmp_path / "work", what) as started:
        wait_for(lambda: any((work / "trained.safetensors").exists() for work in files(site)))
        assert started.fetch("trained.safetensors", 9).stat().st_size == 9
        assert [len(started.readline()) for _ in range(3000)] == [1000] * 3000
        assert started.readline() == b"wrote"


@pytest.mark.slow
def test_a_job_goes_to_the_host_that_runs_jobs(stand_in, tmp_path):
    with contextlib.ExitStack() as stack:
        site = BrokerProcess(tmp_path / "pool", "serves:8")
        stack.callback(site.close)
        with pytest.raises(LeaseError, match=r"No host of the pool at \S+ runs jobs.*MILLPOND_POOL_RAY_ADDRESS"):
            job.check(site.settings)
        with pytest.raises(LeaseError, match="No host of this pool runs jobs"), running(site, tmp_path / "work", {}):
            pass
        host = HostProcess(site, "gpu-2", **runs_jobs(tmp_path, stand_in))
        stack.callback(host.close)
        job.check(site.settings)
        with running(site, tmp_path / "work", {"says": SAID}) as started:
            assert started.readline() == b'{"a": 1}'
            assert (len(host.workers()), site.workers()) == (1, [])
            host.kill()
            wait_for(lambda: not stand_in.runs())
            while started.readline():
                pass
            assert "is lost with its host gpu-2" in started.why_ended()


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"MILLPOND_POOL_RAY_TOKEN": "wrong"}, "refuses the token. Set MILLPOND_POOL_RAY_TOKEN"),
        ({"MILLPOND_POOL_RAY_ADDRESS": ""}, "No host of this pool runs jobs"),
        ({"MILLPOND_POOL_RAY_ADDRESS": "http://127.0.0.1:{free}"}, r"does not answer.*Start Ray on that host"),
    ],
)
def test_a_host_that_cannot_run_jobs_says_what_to_set(environ, says, ray, start, tmp_path):
    (free,) = free_ports(1)
    site = start(ray, **{name: value.format(free=free) for name, value in environ.items()})
    with pytest.raises(LeaseError, match=says), running(site, tmp_path / "work", {}):
        pass
    wait_for(lambda: site.status().devices[0].free_bytes == 2 * 2**30)
    assert files(site) == []


def test_a_ray_without_a_node_on_this_host_is_told(stand_in, start, tmp_path):
    stand_in.nodes = ["192.0.2.9"]
    with (
        pytest.raises(LeaseError, match=r"Ray has no node on this host \(its nodes are 192\.0\.2\.9\)"),
        running(start(stand_in), tmp_path / "work", {}),
    ):
        pass


def test_on_a_gpu_a_job_sees_the_leased_one_only_and_paddle_holds_it_to_its_memory(monkeypatch, tmp_path):
    site = ray_jobs.Site("http://127.0.0.1:1", "", sys.executable, 1, str(tmp_path), str(tmp_path))
    orders = Orders("lease-1", "token", "127.0.0.1", "cuda:1", 8 * 2**30, os.getpid())
    for visible, expected in (("", "1"), ("GPU-a,GPU-b", "GPU-b")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        command = job_worker.command(orders, site)
        assert command.startswith("exec env -i ")
        assert f" CUDA_VISIBLE_DEVICES={expected} " in command
        assert " FLAGS_gpu_memory_limit_mb=8192 " in command


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "http://", "http://host/path", "auto"])
def test_an_address_of_ray_that_is_no_url_is_refused_at_the_start(address, tmp_path):
    settings = load(PoolSettings, {"MILLPOND_POOL_RAY_ADDRESS": address, "MILLPOND_HOME": str(tmp_path)})
    with pytest.raises(SettingsError, match=r"MILLPOND_POOL_RAY_ADDRESS is .* Write one such as http://"):
        ray_jobs.Site.of(settings)
