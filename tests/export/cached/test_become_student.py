"""A capture with values of its own becomes the packed student by passes, tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.errors import ExportError, PreconditionError, RecipeError
from ti_fx.export.cached.become_student import BecomeStudent, TakeCodes, become
from ti_fx.ir.edit import tensor
from ti_fx.ir.pipeline import Pass
from ti_fx.passes import DuplicateTeacher, Pack, QuantizeActivations, Ternarize

EXAMPLE = {"values": torch.randn(3, 8, generator=torch.Generator().manual_seed(0))}


class Model(nn.Module):
    def __init__(self, seed: int, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(8, 8, bias=bias), nn.Linear(8, 2)

    def forward(self, values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.last(self.first(values).relu())}


def captured(seed: int, bias: bool = True) -> GraphModule:
    return ti_fx.capture(Model(seed, bias).eval(), EXAMPLE)


@pytest.fixture
def student() -> GraphModule:
    gm = captured(0)
    ti_fx.Pipeline(Ternarize(), QuantizeActivations("int8-token"), Pack())(gm)
    return gm


def test_another_capture_becomes_the_student(student: GraphModule) -> None:
    gm = captured(1)
    assert become(gm, student) == []
    assert ti_fx.dump(gm) == ti_fx.dump(student)
    for node in gm.graph.find_nodes(op="get_attr"):
        assert tensor(gm, str(node.target)) is tensor(student, str(node.target))
    assert torch.equal(gm(**EXAMPLE)["logits"], student(**EXAMPLE)["logits"])


@pytest.mark.parametrize("method", ["binary", "seq", "dlt"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group-32"])
def test_it_becomes_a_student_by_any_method(method: str, granularity: str) -> None:
    student = captured(0)
    ti_fx.Pipeline(Ternarize(weights=granularity, method=method), Pack())(student)  # type: ignore[arg-type]
    gm = captured(1)
    assert become(gm, student) == []
    assert ti_fx.dump(gm) == ti_fx.dump(student)
    assert torch.equal(gm(**EXAMPLE)["logits"], student(**EXAMPLE)["logits"])


def test_a_tensor_that_the_student_lacks_is_named() -> None:
    gm = captured(0, bias=False)
    ti_fx.Pipeline(Ternarize(), Pack())(gm)
    with pytest.raises(
        ExportError, match=r"reads first\.bias, and the student does not; is this its model\?"
    ):
        become(captured(1), gm)


def test_learned_steps_are_refused() -> None:
    gm = captured(0)
    ti_fx.Pipeline(Ternarize(), QuantizeActivations("int4-learned"), Pack())(gm)
    with pytest.raises(
        ExportError, match=r"%values_int4 has a learned step, which a graph with a cache can't take"
    ):
        become(captured(1), gm)


def test_the_passes_take_graphs_of_their_stage(student: GraphModule) -> None:
    with pytest.raises(PreconditionError, match="become-student takes a graph that is captured"):
        ti_fx.Pipeline(BecomeStudent(student))(ti_fx.fork(student))
    with pytest.raises(PreconditionError, match="take-codes takes a graph that is packed"):
        ti_fx.Pipeline(TakeCodes(student))(captured(1))


def test_a_graph_or_a_module_is_no_option(student: GraphModule) -> None:
    assert str(BecomeStudent(student)) == "become-student"
    assert str(DuplicateTeacher(teacher=Model(0))) == "duplicate-teacher"
    with pytest.raises(RecipeError, match="duplicate-teacher has no option 'teacher'"):
        Pass.parse("duplicate-teacher{teacher=x}")
