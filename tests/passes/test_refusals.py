"""Each pass refuses what it is not for, and names what is missing."""

from __future__ import annotations

import pytest
import torch
from models import Tiny, vit_model
from torch import Tensor, nn

import ti_fx
from ti_fx.errors import (
    InputError,
    PreconditionError,
    SelectionError,
    TiFxError,
)
from ti_fx.ir.pipeline import Pass, Pipeline
from ti_fx.passes import (
    Distill,
    DuplicateTeacher,
    Intervene,
    Pack,
    QuantizeActivations,
    Ternarize,
)

REFUSALS: dict[str, tuple[tuple[Pass, ...], Pass, type[TiFxError], str]] = {
    "a late teacher": ((Ternarize(),), DuplicateTeacher(), PreconditionError, "full-precision graph.* quantises"),
    "a packed weight": ((Ternarize(), Pack()), Ternarize(), PreconditionError, "can't change a packed weight"),
    "nothing to quantise": ((), QuantizeActivations(), PreconditionError, "run ternarize first"),
    "an unknown encoding": ((Ternarize(),), QuantizeActivations("int8-tenser"), InputError, "mean 'int8-tensor'"),
    "no teacher to distil": ((), Distill(), PreconditionError, "run duplicate-teacher first"),
    "no term": (
        (DuplicateTeacher(),), Distill(0.0, 0.0, 0.0, 0.0), PreconditionError, "at least one weight above 0",
    ),
    "no teacher to read": ((), Intervene("map"), PreconditionError, "run duplicate-teacher first"),
    "an unknown point": ((DuplicateTeacher(),), Intervene("layers"), SelectionError, "can't act at 'layers'; did you"),
    "no such layer": ((DuplicateTeacher(),), Intervene("map", layers=(7,)), SelectionError, "selects none"),
    "no such kind": ((DuplicateTeacher(),), Intervene("map", kind="cross"), SelectionError, "selects none"),
    "a layer too many": ((DuplicateTeacher(),), Intervene("map", layers=(0, 7)), SelectionError, "layers=0,7.*7"),
    "nothing to pack": ((), Pack(), PreconditionError, "run ternarize first"),
    "a teacher in the pack": ((DuplicateTeacher(), Ternarize()), Pack(), PreconditionError, "run strip first"),
    "a glob without match": ((), Ternarize(skip=("*.nothing",)), SelectionError, "matches no weight"),
    "an activation glob without match": (
        (Ternarize(),), QuantizeActivations(skip=("*.nothing",)), SelectionError, "matches no ternary projection",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_pass_refuses_what_it_is_not_for(name: str, bert: Tiny) -> None:
    before, one, error, says = REFUSALS[name]
    gm = bert.fork()
    Pipeline(*before)(gm)
    text = ti_fx.dump(gm)
    with pytest.raises(error, match=says) as caught:
        Pipeline(one)(gm)
    assert "\n" not in str(caught.value)
    assert ti_fx.dump(gm) == text


@pytest.mark.parametrize("one", [Intervene("map"), Distill(), QuantizeActivations(attention=True)], ids=str)
def test_fused_attention_is_refused(one: Pass, plain: Tiny) -> None:
    gm = plain.fork()
    Pipeline(DuplicateTeacher(), Ternarize())(gm)
    with pytest.raises(PreconditionError, match=r"stack 0, layer 0.*run decompose-attention first"):
        Pipeline(one)(gm)


def test_padding_without_a_mask_is_refused() -> None:
    gm = ti_fx.capture(vit_model(), {"pixel_values": torch.randn(2, 3, 8, 8)})
    Pipeline(DuplicateTeacher())(gm)
    with pytest.raises(PreconditionError, match="no attention mask among the inputs"):
        Pipeline(Distill(mask_padding=True))(gm)


def test_a_block_without_output_projection() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)
            return result

    gm = ti_fx.capture(Bare(), {"x": torch.randn(2, 3, 8)})
    Pipeline(DuplicateTeacher(), Intervene("map"))(gm)
    with pytest.raises(PreconditionError, match="has no output"):
        Pipeline(Intervene("output"))(gm)
