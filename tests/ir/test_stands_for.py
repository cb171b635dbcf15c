"""A pass of one's own changes the student alone, and declares which node stands for which."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tiny, bert_model, text_example
from tiny_training import arguments, rows
from torch import nn
from torch.fx import GraphModule, Node

import ti_fx
from ti_fx import Pass, Phase, Pipeline, Recipe
from ti_fx.errors import VerificationError
from ti_fx.export import Runtime, to_onnx
from ti_fx.ir import roles
from ti_fx.ir.edit import call, get_attr, register, supersede
from ti_fx.ir.stages import PREPARED
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
from ti_fx.train import TernaryTrainer

aten = torch.ops.aten


def students(gm: GraphModule, target: Callable[..., Any]) -> Iterator[Node]:
    for node in gm.graph.find_nodes(op="call_function", target=target):
        if roles.is_student(node):
            yield node


@dataclass(frozen=True)
class StudentRelu(Pass):
    """The student's GELU becomes ReLU: a new node, or the same one with another operation."""

    takes = (PREPARED,)

    in_place: bool = False

    def apply(self, gm: GraphModule) -> None:
        for old in students(gm, aten.gelu.default):
            if self.in_place:
                old.target = aten.relu.default
                ti_fx.stands_for(old, old)
                continue
            new = call(old, aten.relu.default, old.args[:1])
            ti_fx.stands_for(new, old)
            supersede(old, new)


@dataclass(frozen=True)
class Temperature(Pass):
    """What each softmax of the student reads is divided by a number, which is trained if it is ``learned``."""

    takes = (PREPARED,)

    by: float = 2.0
    learned: bool = False
    declared: bool = True

    def apply(self, gm: GraphModule) -> None:
        for softmax in students(gm, aten.softmax.int):
            (scores,) = softmax.all_input_nodes
            if roles.fact(scores, "stands_for"):
                continue
            number: float | Node = self.by
            if self.learned:
                name = f"temperatures.{softmax.name}"
                register(gm, name, nn.Parameter(torch.tensor(self.by)))
                number = get_attr(softmax, name, f"{softmax.name}_temperature", "student")
            cooler = call(softmax, aten.div.Tensor, (scores, number), f"{softmax.name}_cooler")
            softmax.replace_input_with(scores, cooler)
            if self.declared:
                ti_fx.stands_for(cooler, scores)


def prepared(tiny: Tiny, *passes: Pass) -> GraphModule:
    gm = copy.deepcopy(tiny.graph)
    quantised = (Ternarize(), QuantizeActivations(), Distill())
    Pipeline(DecomposeAttention(), DuplicateTeacher(), *passes, *quantised)(gm)
    return gm


@pytest.mark.parametrize("in_place", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_another_activation_in_the_student_alone(bert: Tiny, in_place: bool) -> None:
    """The student is what a model with ReLU becomes; the teacher computes what the model did."""
    gm = prepared(bert, StudentRelu(in_place)).eval()
    relu = bert_model(hidden_act="relu")
    relu.load_state_dict(bert.model.state_dict())
    wanted = ti_fx.capture(relu, text_example())
    Pipeline(Ternarize(), QuantizeActivations())(wanted)
    wanted.eval()
    assert torch.equal(gm(**bert.example)["outputs"].logits, wanted(**bert.example).logits)
    torch.testing.assert_close(_teacher_logits(gm, bert), bert.model.eval()(**bert.example).logits)
    bert.model.train()
    assert "relu(%linear_4)" in ti_fx.dump(gm)
    assert ti_fx.dump(gm).count("#student  stands for %gelu") == 2
    Pipeline(Strip(), Pack())(gm)
    Pipeline(Strip(), Pack())(wanted)
    assert torch.equal(gm(**bert.example).logits, wanted(**bert.example).logits)
    assert "stands for" not in ti_fx.dump(gm)


def _teacher_logits(gm: GraphModule, tiny: Tiny) -> torch.Tensor:
    fork = ti_fx.fork(gm)
    output = fork.graph.output_node()
    logits = roles.twin_of(fork.graph)[output.args[0]["outputs"].kwargs["logits"]]  # type: ignore[index, call-overload, union-attr]
    output.args = (logits,)
    fork.recompile()
    value: torch.Tensor = fork.eval()(**tiny.example)
    return value


@pytest.mark.parametrize("last", [False, True])
def test_scores_with_a_temperature(bert: Tiny, last: bool) -> None:
    """Before the other passes or after them: the losses compare, and the map is made of, the divided scores."""
    gm = prepared(bert) if last else prepared(bert, Temperature())
    if last:
        Pipeline(Temperature())(gm)
    site, *_ = ti_fx.find_attention(gm)
    assert site.scores is not None
    assert site.scores.target is aten.div.Tensor
    teacher = roles.twin_of(gm.graph)[site.scores]
    assert roles.twin_of(gm.graph)[site.scores.all_input_nodes[0]] is teacher
    (loss,) = [user for user in site.scores.users if roles.role(user) == "loss"]
    assert loss.args[:2] == (site.scores, teacher)
    assert not Pipeline(Temperature())(gm).changed
    for point in ("map", "context", "output", None):
        Pipeline(Intervene(point))(gm)
        losses = gm.train()(**bert.example)["losses"]
        assert losses["scores"] > 0
    other = prepared(bert, *([] if last else [Temperature()]))
    if last:
        Pipeline(Temperature())(other)
    assert ti_fx.dump(gm) == ti_fx.dump(other)


def test_an_intervention_takes_the_place_of_what_stands_for_the_point(bert: Tiny) -> None:
    @dataclass(frozen=True)
    class Sharper(Pass):
        """The map is squared, in the student."""

        def apply(self, gm: GraphModule) -> None:
            for old in students(gm, aten.softmax.int):
                new = call(old.next, aten.square.default, (old,), f"{old.name}_sharper", "student", like=old)
                for user in [user for user in old.users if user is not new]:
                    user.replace_input_with(old, new)
                ti_fx.stands_for(new, old)

    gm = prepared(bert, Sharper())
    site, *_ = ti_fx.find_attention(gm)
    assert site.map is not None
    assert site.map.target is aten.square.default
    readers = [user for user in site.map.users if user.op != "output"]
    Pipeline(Intervene("map"))(gm)
    teacher = roles.twin_of(gm.graph)[site.map]
    assert all(teacher in reader.all_input_nodes for reader in readers)
    ti_fx.verify(gm)
    Pipeline(Intervene())(gm)
    assert all(site.map in reader.all_input_nodes for reader in readers)


def test_undeclared_it_is_refused_with_the_way_out(bert: Tiny) -> None:
    with pytest.raises(VerificationError, match=r"twins compute the same: .*ti_fx\.stands_for\(new, old\)"):
        prepared(bert, Temperature(declared=False))


def test_another_shape_is_refused(bert: Tiny) -> None:
    @dataclass(frozen=True)
    class Sum(Pass):
        def apply(self, gm: GraphModule) -> None:
            scores = next(students(gm, aten.tanh.default))
            new = call(scores.next, aten.sum.dim_IntList, (scores, [-1], True), "summed", "student")
            ti_fx.stands_for(new, scores)

    with pytest.raises(VerificationError, match="%summed stands for %tanh and has another shape"):
        prepared(bert, Sum())


def test_a_teacher_made_afterwards_is_a_copy(bert: Tiny) -> None:
    gm = copy.deepcopy(bert.graph)
    for old in students(gm, aten.gelu.default):
        old.target = aten.relu.default
        ti_fx.stands_for(old, old)
    Pipeline(DuplicateTeacher())(gm)
    assert ti_fx.dump(gm).count("= relu(") == 4
    assert "stands for" not in ti_fx.dump(gm)


@pytest.mark.slow
def test_it_trains_and_is_exported(tmp_path: Path) -> None:
    """Through every phase, with a parameter of the pass's own; the file computes what the graph does."""
    phases = tuple(Phase(str(point), Intervene(point), 1) for point in ("output", "context", "map", None))
    own = (StudentRelu(), Temperature(learned=True))
    recipe = Recipe("own", schedule=phases, extra_passes=own)
    made = TernaryTrainer(
        bert_model(layers=1), recipe, arguments(tmp_path, max_steps=4), train_dataset=rows(16), compile="off"
    )
    name = "temperatures.softmax"
    before = made.model.prepared().get_parameter(name).item()
    made.train()
    student = made.student()
    assert student.get_parameter(name).item() != before
    Pipeline(Pack())(student)
    to_onnx(student, tmp_path / "student.onnx", text_example())  # which compares the file with the graph
    ids = {name: value.numpy() for name, value in text_example().items()}
    (found,) = Runtime(tmp_path / "student.onnx")(ids).values()
    assert found.shape == (3, 3)
