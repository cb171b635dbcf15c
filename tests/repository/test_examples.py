"""The examples run, as a newcomer would run them, with tiny settings."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.seconds

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = 100
SCORES = re.compile(
    r"^test accuracy: ([\d.]+) in full precision, ([\d.]+) with ternary weights", re.MULTILINE
)


def run_apart(name: str, *arguments: str, cwd: Path) -> str:
    """Run an example in a process and a folder of its own; return what it printed."""
    # The checkout may not be installed: what the tests import, the example imports.
    environment = {
        **os.environ,
        "PYTHONPATH": str(EXAMPLES.parent),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example in this process, which has its imports already, and return what it printed."""

    def called(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return called


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    printed = run_apart("quickstart.py", "--tiny", cwd=tmp_path)
    assert printed.count("stack 0, layer ") == 2
    assert "intervene{at=output}: " in printed
    assert "stored tensors are equal byte for byte" in printed
    assert printed.endswith("ONNX Runtime: logits of shape [5, 3]\n")
    assert (tmp_path / "runs/quickstart/student.onnx").is_file()


@pytest.mark.slow
def test_generate(run: Run) -> None:
    printed = run("generate.py")
    assert "past=0" in printed
    same = re.search(r"(\d+)% of the tokens are those of PyTorch's student", printed)
    assert same is not None
    assert int(same[1]) >= 90


@pytest.mark.slow
def test_bring_your_own(run: Run, tmp_path: Path) -> None:
    printed = run("bring_your_own.py", "--tiny")
    assert SCORES.search(printed)
    assert (tmp_path / "runs/bring_your_own/digits.onnx").is_file()


@pytest.mark.slow
def test_bring_your_own_learns(run: Run) -> None:
    printed = run("bring_your_own.py")
    found = SCORES.search(printed)
    assert found is not None
    full, ternary = map(float, found.groups())
    assert full > 0.88
    assert ternary > full - 0.05


@pytest.mark.slow
def test_no_training(run: Run, tmp_path: Path) -> None:
    printed = run("no_training.py", "--tiny")
    assert re.search(
        r"^[\d.]+ MB became [\d.]+ MB; untrained, the output moved by \d+%$", printed, re.MULTILINE
    )
    assert (tmp_path / "runs/no_training/ternary.onnx").is_file()


@pytest.mark.slow
def test_drawing_an_intervention(run: Run, tmp_path: Path) -> None:
    run("draw_intervention.py", "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text(encoding="utf-8")


def test_every_example_is_short_and_has_a_test() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'("{path.name}"' in tests, f"{path.name} has no test here"
        length = len(path.read_text(encoding="utf-8").splitlines())
        assert length < LINES, f"{path.name} has {length} lines; an example has fewer than {LINES}"
