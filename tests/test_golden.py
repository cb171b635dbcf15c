"""Golden texts are compared, written by one flag, and never written under CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A folder with our conftest.py and one golden test."""
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "test_one.py").write_text("def test_one(golden):\n    golden('one', 'hello')\n")
    return tmp_path


def run(suite: Path, *options: str, ci: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "PYTEST_ADDOPTS")}
    if ci is not None:
        environment["CI"] = ci
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
    return subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True)


def test_the_update_flag_is_refused_under_ci(suite: Path) -> None:
    result = run(suite, "--update-golden", ci="true")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--update-golden is refused where CI is set" in result.stderr
    assert not (suite / "golden").exists()


def test_a_golden_text_is_written_by_the_flag_and_then_compared(suite: Path) -> None:
    missing = run(suite, ci="true")
    assert missing.returncode == pytest.ExitCode.TESTS_FAILED
    assert "no golden text golden/one.txt" in missing.stdout

    assert run(suite, "--update-golden").returncode == pytest.ExitCode.OK
    assert (suite / "golden" / "one.txt").read_text() == "hello\n"
    assert run(suite, ci="true").returncode == pytest.ExitCode.OK

    (suite / "golden" / "one.txt").write_text("goodbye\n")
    changed = run(suite)
    assert changed.returncode == pytest.ExitCode.TESTS_FAILED
    assert "hello" in changed.stdout
    assert "goodbye" in changed.stdout
