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


def test_a_fork_that_keeps_its_tensors_shares_them_with_the_graph_in_training() -> None:
    gm = ti_fx.capture(seeded(PlainTransformer), {"tokens": tokens(), "keep": tokens()})
    Pipeline(DuplicateTeacher(), Ternarize())(gm)
    kept, alone = ti_fx.fork(gm), ti_fx.fork(gm)
    Pipeline(Strip(keep_tensors=True))(kept)
    Pipeline(Strip())(alone)
    assert ti_fx.dump(kept) == ti_fx.dump(alone)
    assert kept._modules["teacher"] is gm._modules["teacher"]
    assert "teacher" not in alone._modules
