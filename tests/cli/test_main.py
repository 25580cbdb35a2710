"""The real command in a process of its own: what it loads, what it says, how it exits."""

import json
import os
import subprocess
import sys

import pytest

from millpond import MillpondError, __version__
from millpond.cli import main
from millpond.cli.main import PARTS

MAIN = sys.modules["millpond.cli.main"]  # the package has a function of the same name

HEAVY = ("torch", "onnxruntime", "onnx", "flask", "sqlalchemy", "pyarrow", "model_signing", "matplotlib", "numpy")

LOADED = """
import sys
sys.argv = ["millpond", *sys.argv[1:]]
from millpond.cli import main
try:
    main()
except SystemExit as end:
    code = end.code or 0
print("LOADED", code, *[name for name in {heavy!r} if name in sys.modules])
"""


def _millpond(*arguments, **environ):
    command = [sys.executable, "-m", "millpond", *arguments]
    return subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "arguments", [[], *([part] for part in PARTS)], ids=lambda arguments: "".join(arguments) or "all"
)
def test_help_is_there_and_loads_nothing_heavy(arguments):
    command = [sys.executable, "-c", LOADED.format(heavy=HEAVY), *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1].split() == ["LOADED", "0"], done.stderr
    assert "Usage: millpond" in done.stdout


def test_help_lists_every_part():
    shown = _millpond("--help").stdout
    assert all(part in shown for part in PARTS)


def test_version():
    assert _millpond("--version").stdout == f"millpond {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["--nothing"],
        ["registry", "nothing"],
        ["registry", "list", "--nothing"],
        ["registry", "tag", "sentiment"],
        ["settings", "extra"],
    ],
    ids=" ".join,
)
def test_wrong_command_gets_one_message_and_exit_2(arguments):
    done = _millpond(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Error" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 5


def test_wrong_setting_gets_one_message_and_exit_2():
    done = _millpond("settings", MILLPOND_HUB_PORT="eighty")
    assert done.returncode == 2
    assert done.stderr == (
        "error: MILLPOND_HUB_PORT is 'eighty', which is not a whole number. Correct it, or unset it.\n"
    )


def test_settings_never_print_a_secret():
    done = _millpond("settings", "--json", MILLPOND_HUB_EDGE_TOKEN="hidden")
    assert json.loads(done.stdout)["MILLPOND_HUB_EDGE_TOKEN"]["value"] == "(set)"
    assert "hidden" not in done.stdout + _millpond("settings", MILLPOND_HUB_EDGE_TOKEN="hidden").stdout


@pytest.fixture
def failing(monkeypatch):
    """Return a function that runs `main` with a command line whose command raises."""

    def run(error):
        def build(arguments):
            def command(prog_name):
                raise error

            return command

        monkeypatch.setattr(MAIN, "build", build)
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code

    return run


def test_error_for_people_is_printed_as_it_is(failing, capsys):
    assert failing(MillpondError("No room in [/tmp]. Make some.")) == 2
    assert capsys.readouterr().err == "error: No room in [/tmp]. Make some.\n"


def test_package_that_is_not_installed_is_named_with_the_extra(failing, capsys):
    assert failing(ModuleNotFoundError("No module named 'torch'", name="torch")) == 2
    message = capsys.readouterr().err
    assert "'torch'" in message
    assert "pip install 'millpond[all]'" in message


def test_own_module_that_is_missing_is_a_bug_and_shows(monkeypatch):
    def build(arguments):
        raise ModuleNotFoundError("No module named 'millpond.x'", name="millpond.x")

    monkeypatch.setattr(MAIN, "build", build)
    with pytest.raises(ModuleNotFoundError):
        main()


def test_interrupt_exits_with_130(failing):
    assert failing(KeyboardInterrupt()) == 130


def test_reader_that_goes_away_is_no_error():
    reader = subprocess.Popen(
        f"{sys.executable} -m millpond settings | head -c 1",
        shell=True,
        executable="/bin/bash",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _, errors = reader.communicate(timeout=60)
    assert errors == b""
