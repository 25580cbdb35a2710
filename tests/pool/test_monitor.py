"""What a host can lend. GPUs are looked up by a real child process; here its torch is a stand-in that has some."""

import subprocess
import sys

import pytest

from millpond.pool import monitor
from millpond.pool.errors import PoolError
from millpond.settings import SettingsError

GIB = 2**30
TWO_GPUS = """
from types import SimpleNamespace
print("a library's banner")
gpus = [SimpleNamespace(name="H100", total_memory=80 * 2**30), SimpleNamespace(name="A10", total_memory=24 * 2**30)]
cuda = SimpleNamespace(device_count=lambda: len(gpus), get_device_properties=gpus.__getitem__)
"""


@pytest.fixture
def with_torch(tmp_path, monkeypatch):
    """Have the child find a driver, and a torch with this source."""

    def install(source: str) -> None:
        (tmp_path / "torch.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(monitor, "DRIVERS", (str(tmp_path),))

    return install


def test_without_a_gpu_the_cpu_is_lent_with_half_of_the_memory(monkeypatch):
    monkeypatch.setattr(monitor, "DRIVERS", ())
    (device,) = monitor.find_devices()
    assert device.torch_name == "cpu"
    assert device.memory_bytes == monitor.host_memory_bytes() // 2
    assert monitor.find_devices("3GiB")[0].memory_bytes == 3 * GIB


def test_every_gpu_is_lent_under_the_name_that_its_worker_uses(with_torch):
    with_torch(TWO_GPUS)
    devices = monitor.find_devices("3GiB")
    assert [(d.index, d.name, d.torch_name, d.memory_bytes) for d in devices] == [
        (0, "H100", "cuda:0", 80 * GIB),
        (1, "A10", "cuda:1", 24 * GIB),
    ]


@pytest.mark.parametrize(
    ("source", "reason"),
    [("raise RuntimeError('driver too old')", "driver too old"), ("raise SystemExit(0)", "did not answer")],
)
def test_a_broken_driver_is_a_clear_error(with_torch, source, reason):
    with_torch(source)
    with pytest.raises(PoolError, match=reason):
        monitor.find_devices()


def test_a_driver_that_hangs_is_a_clear_error(with_torch, monkeypatch):
    with_torch("import time; time.sleep(600)")
    monkeypatch.setattr(monitor, "LOOK_S", 0.5)
    with pytest.raises(PoolError, match="did not answer"):
        monitor.find_devices()


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(monitor, "CGROUP_LIMIT", limit)
    limit.write_text(f"{GIB}\n")
    assert monitor.host_memory_bytes() == GIB
    limit.write_text("max\n")
    assert monitor.host_memory_bytes() > GIB


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 * GIB), ("4G", 4 * GIB), ("500MB", 500_000_000), ("1.5 gib", 3 * GIB // 2), ("1024", 1024)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert monitor.parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "0.1", "1e9", "4XB", "9" * 16, "99999999TiB", "٣GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(SettingsError, match="--memory is"):
        monitor.parse_size(text, "--memory")


def test_the_broker_loads_no_torch():
    program = "import sys, millpond.pool.broker, millpond.pool.launcher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
