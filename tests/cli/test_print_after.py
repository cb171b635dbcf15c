"""``ti-fx export --print-after`` shows what the lowering makes of a graph, pass by pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from refusals import contents, refused

from ti_fx.ir.pipeline import name_of
from ti_fx.passes.lower import LOWER

SOURCE = ("export", "lowering_models:small_source", "--ternarize")


@pytest.mark.slow
def test_the_text_after_a_lowering_pass_is_printed(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, _ = run(*SOURCE, "--out", tmp_path / "one.onnx", "--print-after", "look-up-packed")
    assert code == 0
    head, *lines = out.splitlines()
    assert head == "after look-up-packed:"
    assert any("look_up_by_table(" in line for line in lines)
    assert any("unpack_ternary(" in line for line in lines)  # the passes that follow write those
    assert not any(line.startswith("after ") for line in lines)

    code, out, _ = run(*SOURCE, "--out", tmp_path / "all.onnx", "--print-after", "all")
    assert code == 0
    shown = [line for line in out.splitlines() if line.startswith("after ")]
    assert shown == [f"after {name_of(one)}:" for one in LOWER.passes]


def test_what_was_lowered_is_printed_where_the_lowering_fails(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    options = ("--encoding", "int8-token", "--opset", 18, "--print-after", "look-up-packed")
    code, out, error = run(*SOURCE, "--out", tmp_path / "small.onnx", *options)
    assert code == 2
    assert "needs opset 21 or newer" in error
    assert error.count("\n") == 1
    assert out.startswith("after look-up-packed:\n")


def test_a_pass_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    line = refused(*SOURCE, "--out", tmp_path / "small.onnx", "--print-after", "look-up")
    assert "no lowering pass is called 'look-up'; did you mean 'look-up-packed'?" in line
    assert contents(tmp_path) == {}
