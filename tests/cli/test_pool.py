"""`millpond pool` as its users start it; the broker is real, its workers are stand-ins but for the last test."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pool_site import DEADLINE_S, GIB, TOKEN, BrokerProcess, wait_for

MILLPOND = [sys.executable, "-m", "millpond", "pool"]
SHOW = "import os, sys; print(os.environ['MILLPOND_POOL_LEASE'], flush=True); "


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[BrokerProcess]:
    broker = BrokerProcess(tmp_path_factory.mktemp("pool") / "pool", "serves:8", "serves:8")
    yield broker
    broker.close()


@pytest.fixture
def own(tmp_path) -> Iterator[BrokerProcess]:
    broker = BrokerProcess(tmp_path / "pool", "serves:8")
    yield broker
    broker.close()


def call(broker: BrokerProcess, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MILLPOND, *arguments],
        env={**broker.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )


class Run:
    """`millpond pool run` in the background, with a Python program that first prints its lease."""

    def __init__(self, broker: BrokerProcess, program: str, *options: str, log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*MILLPOND, "run", *options, "--", sys.executable, "-c", SHOW + program],
                env=broker.environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.lease = wait_for(self._started).split()[0]
        self.command = psutil.Process(self.process.pid).children()[0]

    def _started(self) -> str:
        return next((line for line in self.log.read_text().splitlines() if line.startswith("lease-")), "")

    def end(self) -> int:
        code = self.process.wait(DEADLINE_S)
        assert wait_for(lambda: not self.command.is_running() or self.command.status() == psutil.STATUS_ZOMBIE)
        return code


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("pass", 0),
        ("sys.exit(7)", 7),
        ("raise ValueError", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 128 + 15),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 128 + 9),
    ],
)
def test_the_exit_code_is_the_commands_and_the_lease_is_released(shared, program, code):
    done = call(shared, "run", "--", sys.executable, "-c", SHOW + program)
    assert done.returncode == code
    ended = shared.lease_status(done.stdout.strip())
    assert (ended.state, ended.reason) == ("released", "its client gave it back")


def test_the_commands_own_options_are_its_own(shared):
    done = call(shared, "run", sys.executable, "-c", "import sys; print(sys.argv[1:])", "--wait", "-n", "--json")
    assert done.stdout.strip() == "['--wait', '-n', '--json']"


def test_the_command_is_told_of_its_workers_and_nothing_is_printed(shared):
    program = "import os; print(os.environ['MILLPOND_POOL_WORKERS'])"
    done = call(shared, "run", "-n", "2", "--memory", "2GiB", "--", sys.executable, "-c", program)
    workers = json.loads(done.stdout)
    assert [worker["memory_bytes"] for worker in workers] == [2 * GIB, 2 * GIB]
    assert done.stderr == ""
    assert TOKEN not in shared.log.read_text()


@pytest.mark.parametrize("command", ["no-such-command", "./no/such/file"])
def test_a_command_that_is_not_there_gives_127_and_takes_no_lease(shared, command):
    before = len(shared.status().leases)
    done = call(shared, "run", "--", command)
    assert done.returncode == 127
    assert f"{command} is not a command here" in done.stderr
    assert len(shared.status().leases) == before


def test_a_file_that_may_not_be_executed_gives_126(shared, tmp_path):
    script = tmp_path / "script"
    script.write_text("exit 0\n")
    done = call(shared, "run", "--", str(script))
    assert done.returncode == 126
    assert "may not be executed" in done.stderr


def test_a_missing_interpreter_gives_127_and_releases(shared, tmp_path):
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o700)
    done = call(shared, "run", "--", str(script))
    assert done.returncode == 127
    assert "cannot be started" in done.stderr
    assert shared.status().leases[0].state == "released"


def test_no_broker_is_a_clear_error(shared):
    done = call(shared, "run", "--", "true", MILLPOND_POOL_ADDRESS="127.0.0.1:1")
    assert done.returncode == 2
    assert "No pool can be reached" in done.stderr
    assert "millpond pool serve" in done.stderr


@pytest.mark.parametrize("size", ["lots", "0", "-1GiB", "4XiB", "9" * 30])
def test_a_memory_that_is_no_size_is_a_clear_error(shared, size):
    done = call(shared, "run", f"--memory={size}", "--", "true")
    assert done.returncode == 2
    assert "is not a size" in done.stderr


def test_a_busy_pool_says_who_holds_it(shared):
    with shared.acquire("ann", devices=2):
        done = call(shared, "run", "--wait", "0.3", "--", "true")
    assert done.returncode == 2
    assert "waits (held: device 0 by ann; device 1 by ann)" in done.stderr
    assert "no device was free within 0.3 s" in done.stderr


def test_status_shows_devices_and_leases(shared):
    with shared.acquire("ann", memory_bytes=3 * GIB, wait_s=20) as lease:  # an earlier test's workers may still end
        shown = call(shared, "status").stdout
        as_json = json.loads(call(shared, "status", "--json").stdout)
    assert "stand-in 0" in shown
    assert lease.granted.lease in shown
    assert sorted(device["free_bytes"] for device in as_json["devices"]) == [5 * GIB, 8 * GIB]
    assert (as_json["leases"][0]["lease"], as_json["leases"][0]["state"]) == (lease.granted.lease, "active")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_go_to_the_command_and_the_lease_is_released(own, tmp_path, number):
    program = "import signal, time; signal.signal(%d, lambda *_: sys.exit(9)); print('ready', flush=True)\n"
    run = Run(own, program % number + "while True: time.sleep(1)", log=tmp_path / "run.log")
    wait_for(lambda: "ready" in run.log.read_text())
    run.process.send_signal(number)
    assert run.end() == 9
    assert own.wait_ended(run.lease).state == "released"


def test_ctrl_c_while_waiting_leaves_the_queue(own, tmp_path):
    with own.acquire():
        waiting = subprocess.Popen([*MILLPOND, "run", "--", "true"], env=own.environ, stderr=subprocess.PIPE)
        wait_for(lambda: own.status().leases[0].state == "pending")
        waiting.send_signal(signal.SIGINT)
        _, stderr = waiting.communicate(timeout=DEADLINE_S)
        assert waiting.returncode == 130
        assert b"Traceback" not in stderr
        wait_for(lambda: own.status().leases[0].state == "failed")


def test_a_killed_run_leaves_no_command_no_lease_and_no_worker(own, tmp_path):
    run = Run(own, "import time; time.sleep(600)", log=tmp_path / "run.log")
    run.process.kill()
    run.end()
    assert own.wait_ended(run.lease).state == "failed"


def test_a_run_ends_with_its_parent(own, tmp_path):
    log = tmp_path / "run.log"
    command = [*MILLPOND, "run", "--", sys.executable, "-c", SHOW + "import time; time.sleep(600)"]
    program = f"import subprocess; subprocess.run({command!r}, stdout=open({str(log)!r}, 'w'))"
    parent = subprocess.Popen([sys.executable, "-c", program], env=own.environ)
    lease = wait_for(lambda: log.exists() and log.read_text()).strip()
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) == 2
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(children, 5)[1]
    assert own.wait_ended(lease).state == "failed"


def test_under_nohup_a_run_outlives_its_parent(own, tmp_path):
    log = tmp_path / "run.log"
    command = [*MILLPOND, "run", "--", sys.executable, "-c", SHOW + "import time; time.sleep(600)"]
    program = "import signal, subprocess; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    program += f"subprocess.run({command!r}, stdout=open({str(log)!r}, 'w'))"
    parent = subprocess.Popen([sys.executable, "-c", program], env=own.environ)
    lease = wait_for(lambda: log.exists() and log.read_text()).strip()
    run, _ = children = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    assert run.is_running()
    assert own.lease_status(lease).state == "active"
    run.terminate()
    assert not psutil.wait_procs(children, 5)[1]
    assert own.wait_ended(lease).state == "released"


def kill_worker(broker: BrokerProcess) -> None:
    for worker in broker.workers():
        worker.kill()


def kill_broker(broker: BrokerProcess) -> None:
    broker.kill()


@pytest.mark.parametrize(
    ("kill", "reason"),
    [
        (kill_worker, "was ended by SIGKILL"),
        pytest.param(kill_broker, "is gone: the other end closed", marks=pytest.mark.slow),
    ],
)
def test_a_command_that_ends_by_itself_after_a_loss_keeps_its_error(own, tmp_path, kill, reason):
    until_told = "import os, pathlib, time\nwhile not pathlib.Path(os.environ['MILLPOND_POOL_ENDED']).exists(): "
    run = Run(own, until_told + "time.sleep(0.05)\nsys.exit(5)", log=tmp_path / "run.log")
    kill(own)
    assert run.end() == 5
    line = next(line for line in run.log.read_text().splitlines() if "is lost" in line)
    assert f"millpond pool: {run.lease} (worker " in line
    assert reason in line


@pytest.mark.slow
@pytest.mark.parametrize("kill", [kill_worker, kill_broker])
def test_after_a_loss_nothing_is_left_within_ten_seconds(own, tmp_path, kill):
    stubborn = "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    stubborn += "subprocess.Popen(['sleep', '600']); print('ready', flush=True); time.sleep(600)"
    run = Run(own, stubborn, log=tmp_path / "run.log")
    wait_for(lambda: "ready" in run.log.read_text())
    everything = [*run.command.children(), run.command, *own.workers()]
    started = time.monotonic()
    kill(own)
    assert run.process.wait(DEADLINE_S) == 128 + 9
    assert not psutil.wait_procs(everything, 10 - (time.monotonic() - started))[1]
    assert time.monotonic() - started < 10


@pytest.mark.slow
def test_a_program_computes_on_a_real_pool_device(tmp_path):
    broker = BrokerProcess(tmp_path / "pool", MILLPOND_POOL_MEMORY="1GiB")
    program = "import torch; print((torch.ones(3, device='pool:0') * 2).sum().item())"
    try:
        done = call(broker, "run", "--memory", "512MiB", "--", sys.executable, "-c", program)
        assert (done.returncode, done.stdout.strip()) == (0, "6.0"), done.stderr
        broker.wait_ended(broker.status().leases[0].lease)
    finally:
        broker.close()


@pytest.mark.slow
@pytest.mark.parametrize("kill", [kill_worker, kill_broker])
def test_a_program_whose_pool_is_killed_gets_an_error_that_names_it(tmp_path, kill):
    broker = BrokerProcess(tmp_path / "pool", MILLPOND_POOL_MEMORY="1GiB")
    program = "import torch, time; x = torch.ones(3, device='pool:0')\n"
    program += "print(x.sum().item(), flush=True)\nwhile True: x.add_(1).sum().item(); time.sleep(0.05)"
    try:
        run = Run(broker, program, log=tmp_path / "run.log")
        wait_for(lambda: "3.0" in run.log.read_text(), 60)
        started = time.monotonic()
        kill(broker)
        assert run.end() not in (0, 128 + 9, 128 + 15)
        assert time.monotonic() - started < 10
        assert "ConnectionLost" in run.log.read_text()
        assert f"{run.lease} (worker " in run.log.read_text()
    finally:
        broker.close()
