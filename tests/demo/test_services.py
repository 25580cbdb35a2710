import os
import sys
from pathlib import Path

import psutil
import pytest

from millpond.demo.services import KEPT_FILE, Service, ServiceFailed, stop_kept

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


def service(tmp_path: Path, command: list[str], **options: bool) -> Service:
    log = tmp_path / "service.log"
    return Service("test", command, os.environ, log, lambda: "up" in log.read_text(), **options)


def test_a_killed_service_starts_again(tmp_path: Path) -> None:
    sleeper = service(tmp_path, SLEEPER)
    sleeper.start()
    sleeper.wait_ready()
    first = sleeper.pid
    sleeper.kill()
    assert sleeper.pid is None
    sleeper.start()
    sleeper.wait_ready()
    assert sleeper.pid not in (None, first)
    sleeper.stop()
    assert sleeper.pid is None


def test_a_service_that_ends_as_it_starts_shows_the_end_of_its_log(tmp_path: Path) -> None:
    broken = service(tmp_path, [sys.executable, "-c", "raise SystemExit('the disk is gone')"])
    broken.start()
    with pytest.raises(ServiceFailed, match=r"(?s)ended as it started.*service\.log.*the disk is gone"):
        broken.wait_ready()


def test_a_service_that_does_not_answer_is_named(tmp_path: Path) -> None:
    silent = service(tmp_path, [sys.executable, "-c", "import time; time.sleep(60)"])
    silent.start()
    with pytest.raises(ServiceFailed, match=r"did not answer within"):
        silent.wait_ready(timeout_s=0.2)
    silent.stop()


def test_services_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    starter = (
        "import os, pathlib, sys, time\n"
        "from millpond.demo.services import Service\n"
        f"service = Service('x', {SLEEPER!r}, os.environ, pathlib.Path({str(tmp_path)!r}) / 'x.log', lambda: True)\n"
        "service.start(); print(service.pid, flush=True); time.sleep(60)\n"
    )
    with psutil.Popen([sys.executable, "-c", starter], stdout=-1) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    child.wait(timeout=10)


def test_stop_kept_ends_what_was_left_and_spares_a_process_that_took_over_the_id(tmp_path: Path) -> None:
    left = service(tmp_path, SLEEPER, outlives_us=True)
    left.start()
    left.wait_ready()
    ours = psutil.Process()
    started = psutil.Process(left.pid).create_time()
    (tmp_path / KEPT_FILE).write_text(
        f'[{{"name":"edge","pid":{left.pid},"started":{started}}},'
        f'{{"name":"hub","pid":{ours.pid},"started":{ours.create_time() - 500}}}]'
    )
    assert stop_kept(tmp_path) == ["edge"]
    assert left.pid is None
    with pytest.raises(ServiceFailed, match="No demo left services"):
        stop_kept(tmp_path)
