"""What must run before a pass is said by the pass itself, and the command line runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from models import Tiny
from torch.fx import GraphModule

from ti_fx import Pass, Pipeline
from ti_fx.cli import _loading
from ti_fx.cli._missing import run_after_missing
from ti_fx.errors import PreconditionError
from ti_fx.passes import (
    DecomposeAttention,
    Distill,
    DuplicateTeacher,
    Intervene,
    Pack,
    QuantizeActivations,
    Ternarize,
)

Run = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class NeedsNothingThatHelps(Pass):
    """A pass that ternarize does not satisfy, whatever it says."""

    def requires(self, gm: GraphModule) -> None:
        raise PreconditionError("this never runs", missing="ternarize")


@dataclass(frozen=True)
class NeedsItself(Pass):
    """A pass that must run before itself."""

    def requires(self, gm: GraphModule) -> None:
        raise PreconditionError("this never runs", missing="needs-itself")


@pytest.mark.parametrize(
    ("before", "one", "missing"),
    [
        ((), QuantizeActivations(), "ternarize"),
        ((Ternarize(),), QuantizeActivations(attention=True), "decompose-attention"),
        ((), Distill(), "duplicate-teacher"),
        ((DuplicateTeacher(),), Distill(), "decompose-attention"),
        ((), Intervene("map"), "duplicate-teacher"),
        ((DuplicateTeacher(),), Intervene("map"), "decompose-attention"),
        ((), Pack(), "ternarize"),
        ((DuplicateTeacher(), Ternarize()), Pack(), "strip"),
    ],
    ids=str,
)
def test_a_refusal_names_the_missing_pass(
    plain: Tiny, before: tuple[Pass, ...], one: Pass, missing: str
) -> None:
    gm = plain.fork()
    Pipeline(*before)(gm)
    with pytest.raises(PreconditionError) as refused:
        one.requires(gm)
    assert refused.value.missing == missing
    assert str(refused.value).endswith(f"; run {missing} first")


def test_where_no_pass_helps_none_is_named(plain: Tiny) -> None:
    gm = plain.fork()
    Pipeline(DecomposeAttention(), DuplicateTeacher())(gm)
    with pytest.raises(PreconditionError) as refused:
        Distill(0.0, 0.0, 0.0, 0.0).requires(gm)
    assert refused.value.missing is None


@pytest.mark.parametrize(
    ("one", "ran"),
    [
        (Ternarize(), ["ternarize"]),
        (QuantizeActivations(), ["ternarize", "quantize-activations"]),
        (Distill(), ["duplicate-teacher", "decompose-attention", "distill"]),
        (Pack(), ["ternarize", "pack"]),
    ],
    ids=str,
)
def test_what_is_missing_runs_before(plain: Tiny, one: Pass, ran: list[str]) -> None:
    gm = plain.fork()

    def run(each: Pass) -> str:
        Pipeline(each)(gm)
        return str(each)

    assert run_after_missing(one, run) == ran


@pytest.mark.parametrize("one", [NeedsNothingThatHelps(), NeedsItself()], ids=str)
def test_what_does_not_help_is_not_run_for_ever(plain: Tiny, one: Pass) -> None:
    gm = plain.fork()
    with pytest.raises(PreconditionError, match="this never runs"):
        run_after_missing(one, lambda each: Pipeline(each)(gm))


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch, plain: Tiny) -> str:
    """The name of a captured model whose attention is one fused node a block."""

    def load(source: str, meta: bool) -> Any:
        return _loading.Loaded(source, plain.fork())

    monkeypatch.setattr(_loading, "load_graph", load)
    return "fused"


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ("intervene{at=map}", "duplicate-teacher, decompose-attention"),
        ("quantize-activations{attention=true}", "ternarize, decompose-attention"),
        (
            "strip",
            "decompose-attention, duplicate-teacher, ternarize, quantize-activations, distill",
        ),
    ],
)
def test_the_command_line_names_what_ran_first(run: Run, fused: str, asked: str, first: str) -> None:
    code, out, err = run("inspect", fused, "--diff", asked)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"first ran: {first}"
    assert out.splitlines()[1].startswith(f"{asked}: ")
    assert "@@" in out


def test_a_prepared_graph_is_stripped_before_it_is_packed(run: Run, fused: str) -> None:
    code, out, err = run("inspect", fused, "--recipe", "ternarybert", "--diff", "pack")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].endswith("distill, intervene, strip")


def test_a_pass_that_changes_nothing_runs_alone(run: Run, fused: str) -> None:
    code, out, err = run(
        "inspect", fused, "--diff", "decompose-attention", "--diff", "decompose-attention", "--diff", "strip"
    )
    assert (code, err) == (0, "")
    assert "first ran" not in out
    assert "strip: 0 added, 0 removed, 0 rewired" in out
