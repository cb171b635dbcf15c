"""The command line's help loads nothing that takes seconds, and says what every command does in a whole sentence."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys

import pytest

from ti_fx import cli

COMMANDS = sorted(
    module.name for module in pkgutil.iter_modules(cli.__path__) if not module.name.startswith("_")
)
SLOW = ("torch", "transformers", "sympy", "numpy", "onnx", "onnxruntime", "pydantic", "rich")
LOADED = f"""
import sys
{{}}
print("loaded", *[name for name in {SLOW} if name in sys.modules], file=sys.stderr)
"""
HELP = """
from ti_fx.cli import main
try:
    main()
except SystemExit as stopped:
    assert not stopped.code, stopped.code
"""


def fresh(code: str, *arguments: str) -> tuple[str, str]:
    """Run code in a fresh process, and return what it printed and the slow packages that it loaded."""
    command = [sys.executable, "-c", LOADED.format(code), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.startswith("loaded"), ran.stderr
    return ran.stdout, ran.stderr.removeprefix("loaded").strip()


def test_importing_the_package_loads_nothing_slow() -> None:
    assert fresh("import ti_fx; ti_fx.__version__")[1] == ""


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), *((name, "--help") for name in COMMANDS)])
def test_help_loads_nothing_slow(arguments: tuple[str, ...]) -> None:
    assert fresh(HELP, *arguments)[1] == ""


def test_help_lists_every_command_with_a_whole_sentence() -> None:
    lines = fresh(HELP, "--help")[0].partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == COMMANDS
    for line in lines:
        assert line.endswith("."), line
        assert not line.endswith("..."), line


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_a_help_keep_their_lines(command: str) -> None:
    shown = fresh(HELP, command, "--help")[0]
    assert "Example" in shown
    assert f"\n    ti-fx {command}" in shown
    assert "\b" not in shown
