"""A real PostgreSQL server of the test's own, on loopback."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "/nowhere")]
IS_INSTALLED = PROGRAMS[-1].exists()
HOW_TO_INSTALL = "the PostgreSQL server is not installed (apt: postgresql)"


@contextmanager
def postgresql() -> Iterator[str]:
    """Start a server and yield its URL without the database's name; it trusts everyone on this machine."""
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name  # it refuses to run as root
    place = Path(tempfile.mkdtemp(prefix="millpond-pg-"))
    if os.geteuid() == 0:
        shutil.chown(place, user)
    programs = PROGRAMS[-1].parent
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    run_as: dict[str, Any] = {"user": user, "cwd": place} if os.geteuid() == 0 else {"cwd": place}
    initialize = [programs / "initdb", "-D", place / "data", "-U", "millpond", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(initialize, check=True, capture_output=True, **run_as)
    line = [programs / "postgres", "-D", place / "data", "-h", "127.0.0.1", "-p", str(port), "-k", place]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log, **run_as)
    try:
        deadline = time.monotonic() + 30
        while subprocess.run(
            [programs / "pg_isready", "-h", "127.0.0.1", "-p", str(port)], capture_output=True
        ).returncode:
            assert time.monotonic() < deadline, (place / "log").read_text()
            time.sleep(0.05)
        yield f"postgresql+psycopg://millpond@127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(place)
