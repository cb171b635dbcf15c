"""The teacher is the model bit for bit, or another that is given."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import Tiny, bert_model
from recorder import run_recorded
from torch import Tensor

import ti_fx
from ti_fx.errors import (
    InputError,
)
from ti_fx.ir import roles
from ti_fx.ir.edit import tensor
from ti_fx.ir.pipeline import Pipeline
from ti_fx.passes import (
    Distill,
    DuplicateTeacher,
)


def test_the_teacher_is_the_model_bit_for_bit(tiny: Tiny) -> None:
    gm = copy.deepcopy(tiny.graph).train(False)
    gm.requires_grad_(False)  # torch multiplies matrices another way where a gradient is needed
    expected = gm(**tiny.example)
    Pipeline(DuplicateTeacher())(gm)
    leaves = torch.utils._pytree.tree_leaves
    result = gm(**tiny.example)
    for one, other in zip(leaves(expected), leaves(result), strict=True):
        assert torch.equal(one, other)
    values = run_recorded(gm, tiny.example)
    training = run_recorded(gm.train(), tiny.example)
    for twin, node in roles.twins(gm.graph).items():
        if isinstance(values[node.name], Tensor):
            assert torch.equal(values[twin.name], values[node.name])
    for twin in roles.twins(gm.graph):
        if isinstance(values[twin.name], Tensor):
            assert torch.equal(training[twin.name], values[twin.name]), "the teacher stays in eval mode"


def test_another_model_as_teacher(bert: Tiny) -> None:
    other = copy.deepcopy(bert.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    gm = bert.fork().train(False)
    before = gm(**bert.example).logits
    Pipeline(DuplicateTeacher(teacher=other))(gm)
    assert torch.equal(gm(**bert.example).logits, before)
    assert torch.equal(tensor(gm, "teacher.classifier.weight"), 2 * tensor(gm, "classifier.weight"))
    values = run_recorded(gm, bert.example)
    expected = ti_fx.capture(other, bert.example).eval()(**bert.example).logits
    outputs: Any = gm.graph.output_node().args[0]
    logits = next(twin for twin, node in roles.twins(gm.graph).items() if node is outputs.kwargs["logits"])
    assert torch.equal(values[logits.name], expected)
    text = ti_fx.dump(gm)
    Pipeline(DuplicateTeacher(teacher=bert.model))(gm)
    assert torch.equal(tensor(gm, "teacher.classifier.weight"), tensor(gm, "classifier.weight"))
    assert ti_fx.dump(gm) == text


def test_a_teacher_in_another_dtype(bert: Tiny) -> None:
    other = copy.deepcopy(bert.model).to(torch.float64)
    gm = bert.fork()
    Pipeline(DuplicateTeacher())(gm)
    Pipeline(DuplicateTeacher(teacher=other), Distill())(gm)
    assert "f64[batch, 3]  @classifier  #teacher" in ti_fx.dump(gm)
    assert gm(**bert.example)["loss"].isfinite()


def test_a_teacher_of_another_shape_is_refused(bert: Tiny) -> None:
    with pytest.raises(InputError, match=r"the teacher's .* is .*, the student's"):
        Pipeline(DuplicateTeacher(teacher=bert_model(2, intermediate_size=48)))(bert.fork())
    with pytest.raises(InputError, match=r"no tensor bert\.encoder\.layer\.1"):
        Pipeline(DuplicateTeacher(teacher=bert_model(1)))(bert.fork())
