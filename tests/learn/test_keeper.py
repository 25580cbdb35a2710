"""The keeper: whatever ends a program, nothing that it started is left, nor its directory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from waiting import is_alive, wait_for

PROGRAM = """
import subprocess, sys, time
keeper = subprocess.Popen(
    [sys.executable, "-m", "millpond.learn.keeper", sys.argv[1]], stdin=subprocess.PIPE, start_new_session=True
)
# A grandchild in a session of its own, whose parent goes: none of ours any more, but for the keeper.
child = subprocess.Popen(["sh", "-c", "setsid sleep 1000 & echo $!; sleep 1000"], stdout=subprocess.PIPE)
print(keeper.pid, child.pid, int(child.stdout.readline()), flush=True)
time.sleep(1000)
"""


def ignores(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.findall(r"SigIgn:\s*(\w+)", status)[0], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_what_a_program_started_ends_with_it(ending: signal.Signals, tmp_path: Path) -> None:
    directory = tmp_path / "scratch"
    (directory / "inner").mkdir(parents=True)
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ,
    )
    with program:
        assert program.stdout is not None
        keeper, child, grandchild = map(int, program.stdout.readline().split())
        try:
            # The keeper is up, and has looked once more after all of them were there: it waits only between its looks.
            wait_for(lambda: ignores(keeper, signal.SIGTERM))
            looked = psutil.Process(keeper).num_ctx_switches().voluntary
            wait_for(lambda: psutil.Process(keeper).num_ctx_switches().voluntary >= looked + 3)
            program.send_signal(ending)
            program.wait(30)
            wait_for(lambda: not any(map(is_alive, (keeper, child, grandchild))))
            assert not directory.exists()
        finally:
            for pid in (program.pid, child, grandchild):
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)
