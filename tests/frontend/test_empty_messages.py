"""Errors that say nothing: one line names their type, wherever an error's first line is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tiny
from torch import Tensor, nn

import ti_fx
from ti_fx.errors import CheckpointError, InputError, RecipeError, VerificationError, first_line
from ti_fx.files import reported
from ti_fx.ir.shapes import refresh
from ti_fx.train.checkpoint import readable

ROOT = next(parent for parent in Path(__file__).parents if (parent / "setup.cfg").is_file())


def fails(*_: Any, **__: Any) -> Any:
    raise ValueError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError(), "ValueError"),
        (ValueError(""), "ValueError"),
        (ValueError("\n  \n"), "ValueError"),
        (ValueError("\none\ntwo"), "one"),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_no_file_takes_an_errors_first_line_in_its_own_way() -> None:
    own = re.compile(r"str\((?:error|own|exception)\b.*\)[^,]*\.(?:splitlines|split|partition)\(")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("ti_fx", "passes", "export", "benchmarks", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if own.search(line.replace(".split())", ""))
    ]
    assert found == ["ti_fx/errors.py: return (str(error).strip().splitlines() or [type(error).__name__])[0]"]


def test_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.json"
    path.write_text("{}")
    monkeypatch.setattr(json, "loads", fails)
    with pytest.raises(RecipeError, match=r"is not JSON: ValueError$"):
        ti_fx.Recipe.load(path)


def test_a_file_that_is_written() -> None:
    with pytest.raises(InputError, match=r"^can't write it: OSError; free some space"), reported("it"):
        raise OSError


def test_a_damaged_training_state() -> None:
    with (
        pytest.raises(CheckpointError, match=r"^can't resume from here: EOFError; its training state"),
        readable("here"),
    ):
        raise EOFError


def test_a_graph_that_lint_refuses(plain: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = plain.fork()

    def refuses() -> None:
        raise RuntimeError

    monkeypatch.setattr(gm.graph, "lint", refuses)
    with pytest.raises(VerificationError, match=r"lint.*: RuntimeError$"):
        ti_fx.verify(gm)


def test_a_node_that_can_not_be_computed(plain: Tiny) -> None:
    gm = plain.fork()
    node = next(node for node in gm.graph.nodes if node.op == "call_function")
    node.target = fails
    with pytest.raises(VerificationError, match=r"can't be computed from its inputs: ValueError$"):
        refresh(gm, [node])


class Silent(nn.Module):
    """Fails in one mode, outside a trace, without a word."""

    def __init__(self, mode: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if self.training is self.mode and not torch.compiler.is_exporting():
            raise NotImplementedError
        result: Tensor = self.linear(x)
        return result


def test_a_model_that_fails_in_training_alone() -> None:
    report = ti_fx.capture_report(ti_fx.capture(Silent(True).eval(), {"x": torch.ones(2, 4)}))
    assert str(report.unchecked).endswith("where it fails on the example: NotImplementedError")


def test_a_model_that_does_not_run_without_values() -> None:
    report = ti_fx.capture_report(ti_fx.capture(Silent(False).to("meta"), {"x": torch.ones(2, 4)}))
    assert str(report.unchecked).endswith("it does not run without values (NotImplementedError)")
