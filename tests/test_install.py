"""`scripts/install`, with a Python of shell script in place of the real one, so that nothing is downloaded."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/install"

FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *"version_info < (3, 11)"*) exec {real} "$@" ;;
    *"import ensurepip"*) exit {no_ensurepip} ;;
    *"%d.%d"*) echo 3.11 ;;
    --version) echo "Python 3.11.2" ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip --version") exit 0 ;;
    "-m pip install "*) echo "pip $*; cache ${{PIP_NO_CACHE_DIR:-kept}}" >> pip.log; exit {pip_fails} ;;
    *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """Return a function that runs the script in an empty directory, on a machine with the tools that it names."""
    tools, project = tmp_path / "bin", tmp_path / "a project"
    tools.mkdir()
    project.mkdir()
    for tool in ("dirname", "rm", "touch", "mkdir", "cp", "env"):
        (tools / tool).symlink_to(f"/usr/bin/{tool}")
    _write(tools / "id", "#!/bin/sh\necho 1000\n")

    def run(*, python=True, no_ensurepip=0, pip_fails=0, **environ):
        if python:
            fake = FAKE_PYTHON.format(real=sys.executable, no_ensurepip=no_ensurepip, pip_fails=pip_fails)
            _write(tools / "python3", fake)
        return subprocess.run(
            ["/bin/sh", str(SCRIPT), "dev", ".venv/installed-dev"],
            cwd=project,
            env={"PATH": str(tools)} | environ,
            capture_output=True,
            text=True,
            timeout=30,
        )

    run.project = project
    return run


def _write(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_environment_is_made_and_stamped(machine):
    done = machine(HOME=str(machine.project))
    assert done.returncode == 0, done.stderr
    assert (machine.project / ".venv/installed-dev").exists()
    assert "constraints.txt --editable .[dev]; cache kept" in (machine.project / "pip.log").read_text()


@pytest.mark.parametrize("environ", [{}, {"HOME": ""}, {"HOME": "/nonexistent"}], ids=["unset", "empty", "unwritable"])
def test_home_is_not_needed(machine, environ):
    assert machine(**environ).returncode == 0
    assert "cache 1" in (machine.project / "pip.log").read_text()


def test_machine_without_a_recent_python_is_told_what_to_install(machine):
    done = machine(python=False)
    assert done.returncode == 1
    assert "Python 3.11 or newer; this machine has no python3 at all" in done.stderr
    assert "apt-get install python3" in done.stderr


def test_debian_without_its_venv_package_gets_the_command(machine):
    done = machine(no_ensurepip=1)
    assert done.returncode == 1
    assert "sudo apt-get install python3.11-venv" in done.stderr
    assert not (machine.project / ".venv").exists()


def test_broken_environment_is_made_anew(machine):
    (machine.project / ".venv/bin").mkdir(parents=True)
    (machine.project / ".venv/bin/python").symlink_to("/nonexistent/python")
    (machine.project / ".venv/left").touch()
    assert machine().returncode == 0
    assert not (machine.project / ".venv/left").exists()


def test_working_environment_is_kept(machine):
    assert machine().returncode == 0
    (machine.project / ".venv/kept").touch()
    assert machine().returncode == 0
    assert (machine.project / ".venv/kept").exists()


def test_failed_install_leaves_no_stamp_and_says_what_to_do(machine):
    done = machine(pip_fails=1)
    assert done.returncode == 1
    assert "just call make" in done.stderr
    assert not (machine.project / ".venv/installed-dev").exists()


def test_every_make_target_has_a_line_of_help():
    root = SCRIPT.parents[1]
    shown = subprocess.run(["make", "-C", root, "help"], capture_output=True, text=True, check=True).stdout
    rules = [line.split(":")[0] for line in (root / "Makefile").read_text().splitlines() if line[:1].isalpha()]
    targets = {name for name in rules if name.isidentifier() and name.islower()}
    assert targets >= {"help", "fix", "check", "test", "bench", "demo", "slow", "browser"}
    assert all(f"make {target} " in shown for target in targets)


@pytest.fixture
def ci(tmp_path):
    """Return a function that runs `.ci/run` in a copy, with a `make` that fails for the targets it is told to."""
    copy = tmp_path / "project/.ci/run"
    copy.parent.mkdir(parents=True)
    copy.write_bytes((SCRIPT.parents[1] / ".ci/run").read_bytes())
    tools = tmp_path / "bin"
    tools.mkdir()
    _write(tools / "dpkg-query", "#!/bin/sh\necho install ok installed\n")

    def run(*failing):
        say = 'echo "made $1 with ${MILLPOND_DATA:-no} data"'
        _write(tools / "make", f'#!/bin/sh\n{say}\ncase " {" ".join(failing)} " in *" $1 "*) exit 7;; esac\n')
        environ = {"PATH": f"{tools}:/usr/bin:/bin"}
        return subprocess.run(["bash", copy], env=environ, cwd="/", capture_output=True, text=True, timeout=60)

    return run


def test_ci_runs_every_part_and_passes_when_all_do(ci):
    done = ci()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("made ")] == [
        "test",
        "check",
        "slow",
        "browser",
    ]
    assert os.access(SCRIPT.parents[1] / ".ci/run", os.X_OK)


@pytest.mark.parametrize("part", ["test", "check", "slow", "browser"])
def test_ci_fails_when_any_part_fails_but_runs_the_others(ci, part):
    done = ci(part)
    assert done.returncode == 1
    assert done.stdout.count("made ") == 4
    assert f"make {part}: FAILED (exit 7)" in done.stdout
    assert f"make {part};" in done.stdout.splitlines()[-1]


def test_ci_finds_corpora_beside_the_project(ci, tmp_path):
    assert "made test with no data" in ci().stdout
    (tmp_path / "shared/data").mkdir(parents=True)
    assert f"made test with {tmp_path}/shared/data data" in ci().stdout
