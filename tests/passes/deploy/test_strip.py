"""Strip leaves the student alone, with the model's own signature."""

from __future__ import annotations

import operator

import torch
from models import PlainTransformer, seeded, tokens

import ti_fx
from ti_fx.ir.pipeline import Pipeline
from ti_fx.passes import (
    DecomposeAttention,
    Distill,
    DuplicateTeacher,
    Intervene,
    Pack,
    QuantizeActivations,
    Strip,
    Ternarize,
)


def test_strip_gives_the_students_signature_back() -> None:
    model = seeded(PlainTransformer)
    gm = ti_fx.capture(model, {"tokens": tokens(), "keep": tokens()})
    Pipeline(
        DecomposeAttention(), DuplicateTeacher(), Ternarize(), QuantizeActivations(attention=True), Distill()
    )(gm)
    gm.eval()
    outputs = gm(tokens=tokens(), keep=tokens())["outputs"]
    Pipeline(Intervene("context"), Strip())(gm)
    assert torch.equal(gm(tokens=tokens(), keep=tokens()), outputs)
    assert not any(name.startswith("teacher") for name, _ in gm.named_modules())
    before = gm(tokens=tokens(), keep=tokens())
    Pipeline(Pack())(gm)
    assert torch.equal(gm(tokens=tokens(), keep=tokens()), before)
    assert not any(node.target is operator.getitem and not node.users for node in gm.graph.nodes)
