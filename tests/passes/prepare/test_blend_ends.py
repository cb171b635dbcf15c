"""A blend equals the intervention at λ = 1 and no intervention at λ = 0, in every bit, and the formula between."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from models import Tiny, prepared
from torch import Tensor
from torch.fx import GraphModule

import ti_fx
from ti_fx.find.points import POINTS, places
from ti_fx.ir.blends import set_shares, shares
from ti_fx.ir.pipeline import Pipeline
from ti_fx.passes import (
    Intervene,
)

ALL = ("bert", "gpt2", "llama", "t5", "vit", "torch_encoder", "plain")
QUICK = {("bert", point) for point in POINTS} | {
    ("gpt2", "map"),
    ("llama", "layer"),
    ("vit", "layer"),
    ("t5", "layer"),
}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(ALL, POINTS)
]


def at(gm: GraphModule, share: float) -> GraphModule:
    """Set every share."""
    set_shares(gm, {one.tap: share for one in shares(gm)})
    return gm


def step(gm: GraphModule, example: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return every recorded value and gradient of one training step; where there is no gradient, zeros."""
    gm.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    result: Any = gm.train()(**example)
    result["loss"].backward()
    values = {
        "loss": result["loss"].detach(),
        **{name: one.detach() for name, one in result["losses"].items()},
    }
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in gm.named_parameters()
    }
    return values, gradients


def same(one: tuple[dict[str, Tensor], ...], other: tuple[dict[str, Tensor], ...]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        differing = [name for name in mine if not torch.equal(mine[name], theirs[name])]
        assert differing == []


@pytest.mark.parametrize(("name", "point"), CASES)
def test_both_ends_are_bit_equal(name: str, point: str, request: pytest.FixtureRequest) -> None:
    tiny: Tiny = request.getfixturevalue(name)
    gm = copy.deepcopy(prepared(tiny))
    with torch.no_grad():  # a teacher of its own, so that it matters whose value is read
        for key, value in gm.named_parameters():
            if key.startswith("teacher."):
                value.mul_(1.5)
    if not places(gm, point) or any(place.tap is None for place in places(gm, point)):
        pytest.skip("the model has no such point")
    plain = step(gm, tiny.example)
    whole, blended = ti_fx.fork(gm), ti_fx.fork(gm)
    Pipeline(Intervene(point))(whole)
    Pipeline(Intervene(point, blend=True))(blended)
    ti_fx.verify(blended)
    intervened = step(whole, tiny.example)
    same(step(at(blended, 0.0), tiny.example), plain)
    same(step(at(blended, 1.0), tiny.example), intervened)
    assert not torch.equal(plain[0]["loss"], intervened[0]["loss"])
    between = step(at(blended, 0.5), tiny.example)
    assert not torch.equal(between[0]["loss"], plain[0]["loss"])
    assert not torch.equal(between[0]["loss"], intervened[0]["loss"])
