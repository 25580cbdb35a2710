"""The tutorial's commands, one block after the other, as a reader types them; only places and ports differ."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs/tutorial/first-loop.md"


def _script(directory: Path, ports: dict[str, int]) -> str:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert "make demo" in blocks[0]  # what the reader has done before
    script = "\n".join(blocks[1:]).replace("/tmp/loop", str(directory))
    for standard, port in ports.items():
        script = script.replace(f"127.0.0.1:{standard}", f"127.0.0.1:{port}")
    return f"set -e\ncd {directory}\n" + script.removesuffix("wait\n") + "wait || true\n"


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tutorial_ends_with_a_better_model_at_the_edge(tmp_path):
    pool, hub, edge = _free_ports(3)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MILLPOND_")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "400",
        "MILLPOND_POOL_PORT": str(pool),
        "MILLPOND_POOL_ADDRESS": f"127.0.0.1:{pool}",
        "MILLPOND_HUB_PORT": str(hub),
        "MILLPOND_EDGE_PORT": str(edge),
    }
    screen = tmp_path / "screen.log"
    with screen.open("wb") as output:
        reader = subprocess.Popen(
            ["bash", "-c", _script(tmp_path, {"7080": hub, "7090": edge})],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):  # told below, with what was on the screen
            reader.wait(500)
        ended = reader.poll()
    finally:
        # A shell without job control ends only its own subshell by `kill %3`: what ran in it is ended here.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(reader.pid, signal.SIGKILL)
        reader.wait()
    logs = "\n".join(f"== {log.name}\n{log.read_text()[-2000:]}" for log in sorted(tmp_path.glob("*.log")))
    shown = screen.read_text()
    assert ended == 0, f"{'not in time' if ended is None else f'exit code {ended}'}\n{logs}"
    assert "v2 promoted" in shown, shown[-3000:]
    assert re.search(r"serving +sentiment v2", shown), shown[-3000:]
    assert "Rolled back from v2 to v1" in shown
