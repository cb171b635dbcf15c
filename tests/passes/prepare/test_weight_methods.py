"""Ternarize by other methods and granularities: what it inserts and refuses, and what other passes make of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_attention import WIDER, WIDTH, example, small_attention
from torch import nn
from torch.fx import GraphModule

import ti_fx
from ti_fx import numerics
from ti_fx.analysis import sensitivity
from ti_fx.analysis.weights import stored_weights
from ti_fx.errors import InputError, PreconditionError, SelectionError
from ti_fx.ir.edit import fork, tensor
from ti_fx.ir.inserted import quantised_weights, weight_quantiser_of
from ti_fx.numerics.weight_codes import GRANULARITIES
from ti_fx.numerics.weight_quantisers import METHODS
from ti_fx.passes import Calibrate, Distill, DuplicateTeacher, Pack, Strip, Ternarize
from ti_fx.passes.prepare.look_up_first import LookUpFirst

STEP = "weight_quant.up.weight.step"


@pytest.fixture(scope="module")
def captured() -> GraphModule:
    return small_attention()


def made(captured: GraphModule, *passes: object) -> GraphModule:
    gm = fork(captured)
    ti_fx.Pipeline(*passes)(gm)  # type: ignore[arg-type]
    return gm


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_packed_student_has_the_values_of_the_quantised_one(
    captured: GraphModule, method: str, granularity: str
) -> None:
    one = Ternarize(weights=granularity, method=method, min_rows=32)  # type: ignore[arg-type]
    assert ti_fx.Pass.parse(str(one)) == one
    gm = made(captured, one)
    assert [weight_quantiser_of(node) for node in quantised_weights(gm)] == [METHODS[method]] * 7
    expected = gm(**example())
    ti_fx.Pipeline(Strip(), Pack())(gm)
    assert torch.equal(gm(**example()), expected)
    rows = {row.name: row for row in stored_weights(captured, one)}
    for row in (row for row in rows.values() if row.is_ternary):
        kinds = ("codes", "scale", "offset") if METHODS[method].shifts else ("codes", "scale")
        parts = [tensor(gm, f"packed.{row.name}_{kind}") for kind in kinds]
        assert row.bytes_after == sum(part.numel() * part.element_size() for part in parts)
        assert row.encoding.startswith(METHODS[method].values)


def test_the_default_stays_what_it_was() -> None:
    assert str(Ternarize()) == "ternarize"
    assert str(Ternarize(method="seq", weights="group-64")) == "ternarize{weights=group-64 method=seq}"


def test_another_method_takes_the_place_of_the_first(captured: GraphModule) -> None:
    gm = made(captured, Ternarize(method="lsq", min_rows=32), Ternarize(method="absmean", min_rows=32))
    assert ti_fx.dump(gm) == ti_fx.dump(made(captured, Ternarize(method="absmean", min_rows=32)))
    assert not any("weight_quant" in name for name in gm.state_dict())


def test_what_is_learned_is_a_parameter_beside_the_weight(captured: GraphModule) -> None:
    gm = made(captured, Ternarize(method="lsq", min_rows=32))
    weight, step = tensor(gm, "up.weight"), tensor(gm, STEP)
    assert isinstance(step, nn.Parameter)
    assert step.requires_grad
    assert float(step.detach()) == pytest.approx(2 * float(weight.detach().abs().mean()))
    assert [name for name in gm.state_dict() if name == STEP] == [STEP]
    assert STEP not in captured.state_dict()
    gm(**example()).square().sum().backward()
    assert float(step.grad.abs()) > 0  # type: ignore[union-attr]
    gm.zero_grad()
    with torch.no_grad():
        step.mul_(2)
    again = made(gm, Ternarize(method="lsq", min_rows=32))  # keeps what was learned
    assert tensor(again, STEP) is step
    rows = made(gm, Ternarize(method="lsq", weights="row", min_rows=32))
    assert tensor(rows, STEP).shape == (WIDER, 1)
    assert tensor(gm, STEP) is step


def test_options_that_do_not_fit_are_refused_in_one_line(captured: GraphModule) -> None:
    with pytest.raises(InputError, match="unknown method 'lqs'"):
        Ternarize(method="lqs")
    with pytest.raises(InputError, match="weights='group-48' is no granularity of twn; use one of tensor"):
        Ternarize(weights="group-48")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lsq learns the range of weights, so clip=1 says nothing"):
        Ternarize(method="lsq", clip=1.0)
    odd = ti_fx.capture(nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.ones(2, 30),))
    with pytest.raises(
        SelectionError, match=r"sherry needs .* multiple of 4, and 0\.weight has 30; leave it out"
    ):
        ti_fx.Pipeline(Ternarize(method="sherry"))(odd)


def test_rows_are_looked_up_first_by_any_method_that_learns_nothing(captured: GraphModule) -> None:
    gm = made(captured, Ternarize(method="absmean", min_rows=32))
    expected = gm(**example())
    ti_fx.Pipeline(LookUpFirst())(gm)
    assert [node.target for node in gm.graph.nodes].count(numerics.quantised_embedding) == 1
    assert torch.equal(gm(**example()), expected)


def test_a_learned_table_is_looked_up_as_it_is(captured: GraphModule) -> None:
    gm = made(captured, Ternarize(method="lsq", min_rows=32))
    before = ti_fx.dump(gm)
    ti_fx.Pipeline(LookUpFirst())(gm)
    assert ti_fx.dump(gm) == before


def test_calibrate_refuses_what_it_can_not_place(captured: GraphModule) -> None:
    for one in (Ternarize(method="absmean"), Ternarize(weights="group-64")):
        gm = made(captured, DuplicateTeacher(), dataclasses.replace(one, min_rows=32), Distill())
        with pytest.raises(
            PreconditionError, match=r"words\.weight is absmean per row|query\.weight is twn per group-64"
        ):
            ti_fx.Pipeline(Calibrate(data=example()))(gm)


def test_sensitivity_leaves_the_others_in_full_precision(captured: GraphModule) -> None:
    gm = made(captured, DuplicateTeacher(), Ternarize(method="seq", weights="row", min_rows=32), Distill())
    rows = sensitivity(gm, [example()])
    assert [row.weights for row in rows][:2] == [("words.weight",), ("query.weight",)]
    assert all(row.cost > 0 for row in rows)
    assert tensor(gm, "weight_quant.query.weight.bound").shape[0] == WIDTH
