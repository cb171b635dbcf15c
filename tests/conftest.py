"""What every test may use: the tiny models, a trained classifier, the golden texts and the command line."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ti_fx import cli

pytest_plugins = ["golden_text", "models", "classifier"]
HERE = Path(__file__).parent
# `make quick` runs these rooms, less what takes seconds: marked so, or by what it asks for.
QUICK = [HERE / name for name in ("numerics", "ir", "find", "repository")]
TAKE_SECONDS = {"tiny", "request", "gpt2", "t5", "vit", "llama", "wheel", "checkout"}


def pytest_collection_finish() -> None:
    """Leave what is imported by now to no collection of garbage: going over it again and again takes minutes."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as quick what is in the quick rooms and takes no seconds; BERT is the one model that it captures."""
    for item in items:
        asked = TAKE_SECONDS.intersection(getattr(item, "fixturenames", ()))
        marked = item.get_closest_marker("slow") or item.get_closest_marker("seconds")
        if HERE / item.path.relative_to(HERE).parts[0] in QUICK and not asked and not marked:
            item.add_marker("quick")


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
