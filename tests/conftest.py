"""What every test may use: the tiny models, a trained classifier, the golden texts and the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from ti_fx import cli

pytest_plugins = ["golden_text", "models", "classifier"]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run ti-fx in this process; return exit code, standard output and standard error."""

    def called(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ti-fx", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        code = stopped.value.code
        assert code is None or isinstance(code, int)
        return code or 0, captured.out, captured.err

    return called
