"""A prepared graph's result is told from a model's own outputs, and the teacher's nodes from their students."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ti_fx
from ti_fx.ir import roles
from ti_fx.ir.outputs import model_outputs, named_leaves, prepared_result
from ti_fx.passes import Distill, DuplicateTeacher, Strip, Ternarize


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.last(self.first(values).relu())}


def test_losses_stand_beside_the_models_outputs() -> None:
    gm = ti_fx.capture(Model().eval(), {"values": torch.randn(2, 4)})
    assert prepared_result(gm) is None
    own = named_leaves(model_outputs(gm))
    ti_fx.Pipeline(DuplicateTeacher(), Ternarize(), Distill(layer_outputs=0, scores=0, attention_outputs=0))(
        gm
    )
    result = prepared_result(gm)
    assert result is not None
    assert list(result.losses) == ["logits"]
    assert result.loss.name == "loss"
    assert named_leaves(result.outputs) == named_leaves(model_outputs(gm)) == own
    twins = roles.twins(gm.graph)
    assert {twin: node for node, twin in roles.twin_of(gm.graph).items()} == twins
    ti_fx.Pipeline(Strip())(gm)
    assert prepared_result(gm) is None
