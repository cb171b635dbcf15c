"""Pipelines: foreign passes, failures with their place, and reports."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import Tiny
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import ti_fx
from ti_fx.errors import (
    InputError,
    PostconditionError,
    RecipeError,
    TiFxError,
    VerificationError,
)
from ti_fx.ir import roles
from ti_fx.ir.pipeline import Pass, Pipeline
from ti_fx.ir.shapes import evaluate, signature
from ti_fx.passes import (
    Distill,
    DuplicateTeacher,
    Intervene,
    Strip,
    Ternarize,
)

aten = torch.ops.aten


def node_of(gm: GraphModule, target: object, role: str = "student") -> Node:
    nodes: Iterable[Node] = gm.graph.nodes
    return next(node for node in nodes if node.target is target and roles.role(node) == role)


# ---- passes of other people


class DoubleGelu(PassBase):
    """Multiplies gelu by two, in place, knowing nothing of ti_fx."""

    def call(self, graph_module: GraphModule) -> PassResult:
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.gelu.default):
            with graph_module.graph.inserting_after(node):
                double = graph_module.graph.call_function(aten.mul.Tensor, (node, 2.0))
            node.replace_all_uses_with(double, delete_user_cb=lambda user, double=double: user is not double)
        return PassResult(graph_module, True)


class CopyAndDouble(DoubleGelu):
    """Returns a new GraphModule."""

    def call(self, graph_module: GraphModule) -> PassResult:
        return super().call(copy.deepcopy(graph_module))


def test_a_foreign_pass_that_edits_in_place(bert: Tiny) -> None:
    gm = bert.fork()
    report = Pipeline(DoubleGelu())(gm)
    assert (report.passes[0].added, report.passes[0].rewired) == (2, 2)
    added = [node for node in gm.graph.nodes if node.target is aten.mul.Tensor and node.args[1] == 2.0]
    assert [roles.role(node) for node in added] == ["student", "student"]
    assert all("val" in node.meta for node in added)
    assert not torch.equal(gm.eval()(**bert.example).logits, bert.graph.eval()(**bert.example).logits)


def test_a_foreign_pass_that_returns_a_new_module(bert: Tiny) -> None:
    gm = copy.deepcopy(bert.graph)
    in_place = copy.deepcopy(bert.graph)
    Pipeline(CopyAndDouble())(gm)
    Pipeline(DoubleGelu())(in_place)
    assert ti_fx.dump(gm) == ti_fx.dump(in_place)
    assert torch.equal(gm.eval()(**bert.example).logits, in_place.eval()(**bert.example).logits)
    Pipeline(DuplicateTeacher(), Ternarize())(gm)
    with pytest.raises(InputError, match="takes the inputs"):
        gm()


def test_roles_follow_the_inputs(bert: Tiny) -> None:
    gm = bert.fork()
    Pipeline(DuplicateTeacher(), Distill())(gm)

    class Negate(PassBase):
        def call(self, graph_module: GraphModule) -> PassResult:
            graph = graph_module.graph
            shared = graph.find_nodes(op="placeholder")[0]
            student = node_of(graph_module, aten.softmax.int)
            teacher = node_of(graph_module, aten.softmax.int, "teacher")
            loss = next(node for node in graph.nodes if node.name == "loss")
            for source in (shared, student, teacher, loss):
                with graph.inserting_after(source):
                    graph.call_function(aten.neg.default, (source,), name=f"negated_{roles.role(source)}")
            return PassResult(graph_module, True)

    Pipeline(Negate())(gm)
    found = {node.name: roles.role(node) for node in gm.graph.nodes if node.target is aten.neg.default}
    assert found == {f"negated_{role}": role for role in ("shared", "student", "teacher", "loss")}


def test_a_node_that_mixes_teacher_and_student_is_refused(bert: Tiny) -> None:
    gm = bert.fork()
    Pipeline(DuplicateTeacher())(gm)

    class Mix(PassBase):
        def call(self, graph_module: GraphModule) -> PassResult:
            student = node_of(graph_module, aten.softmax.int)
            teacher = node_of(graph_module, aten.softmax.int, "teacher")
            with graph_module.graph.inserting_after(teacher):
                graph_module.graph.call_function(aten.add.Tensor, (student, teacher), name="mixed")
            return PassResult(graph_module, True)

    with pytest.raises(
        VerificationError, match="%mixed has no role and reads both teacher and student"
    ) as caught:
        Pipeline(Mix())(gm)
    assert "in pass 1 of 1: " in caught.value.__notes__[0]
    assert "Mix" in caught.value.__notes__[0]


def test_a_pass_that_returns_nothing_is_refused(bert: Tiny) -> None:
    class Nothing(PassBase):
        def call(self, graph_module: GraphModule) -> None:
            return None

    with pytest.raises(PostconditionError, match="Nothing returned nothing"):
        Pipeline(Nothing())(bert.fork())


def test_our_passes_run_in_fx_own_pass_manager(bert: Tiny) -> None:
    from torch.fx.passes.infra.pass_manager import PassManager

    gm = bert.fork()
    result = PassManager(passes=[DuplicateTeacher(), Ternarize(), Ternarize()], steps=1)(gm)
    expected = bert.fork()
    Pipeline(DuplicateTeacher(), Ternarize())(expected)
    assert result.modified
    assert ti_fx.dump(result.graph_module) == ti_fx.dump(expected)
    assert not Ternarize()(gm).modified


# ---- failures


@dataclass(frozen=True)
class Broken(Pass):
    """Makes an edit, then fails."""

    how: str = "raise"

    def apply(self, gm: GraphModule) -> None:
        node = node_of(gm, aten.gelu.default)
        if self.how == "raise":
            node.target = aten.relu.default
            raise KeyError("nothing here")
        if self.how == "cycle":
            node.replace_input_with(node.all_input_nodes[0], next(iter(node.users)))
        if self.how == "shape":
            node.target = aten.sum.default

    def ensures(self, gm: GraphModule) -> None:
        if self.how == "promise":
            raise PostconditionError("broken did not keep its promise")


def test_a_failure_goes_up_as_itself_with_its_place(bert: Tiny) -> None:
    with pytest.raises(KeyError, match="nothing here") as caught:
        Pipeline(DuplicateTeacher(), Broken(), Ternarize())(bert.fork())
    (note,) = caught.value.__notes__
    first, *rest = note.splitlines()
    assert first == "in pass 2 of 3: broken"
    assert any(line.startswith("-%gelu = gelu(") for line in rest)
    assert any(line.startswith("+%gelu = relu(") for line in rest)
    assert len(rest) <= 20


def test_a_broken_promise_names_the_pass(bert: Tiny) -> None:
    with pytest.raises(PostconditionError, match="promise") as caught:
        Pipeline(Broken("promise"))(bert.fork())
    assert caught.value.__notes__[0].startswith("in pass 1 of 1: broken{how=promise}")


def test_a_cycle_is_refused(bert: Tiny) -> None:
    with pytest.raises(VerificationError, match=r"topological order: .*cycle.*%gelu"):
        Pipeline(Broken("cycle"))(bert.fork())


def test_a_shape_that_does_not_fit_names_the_node(bert: Tiny) -> None:
    with pytest.raises(TiFxError, match="%linear_5") as caught:
        Pipeline(Broken("shape"))(bert.fork())
    assert "\n" not in str(caught.value)


def test_a_shape_that_changes_reaches_its_readers(bert: Tiny) -> None:
    class Halve(PassBase):
        """The pooler reads half of the rows."""

        def call(self, graph_module: GraphModule) -> PassResult:
            tanh = node_of(graph_module, aten.tanh.default)
            source = tanh.all_input_nodes[0]
            with graph_module.graph.inserting_before(tanh):
                half = graph_module.graph.call_function(aten.slice.Tensor, (source, 0, 0, 1))
            tanh.replace_input_with(source, half)
            return PassResult(graph_module, True)

    gm = bert.fork()
    Pipeline(Halve())(gm)
    last = node_of(gm, aten.tanh.default)
    assert tuple(last.meta["val"].shape) == (1, 16)
    for node in gm.graph.nodes:
        if node.op != "output":
            assert signature(evaluate(gm, node)) == signature(node.meta["val"])
    assert gm(**bert.example).logits.shape == (1, 3)


# ---- reports


def test_the_report_counts_what_changed(bert: Tiny) -> None:
    gm = bert.fork()
    before = len(gm.graph.nodes)
    parameters = sum(parameter.numel() for parameter in gm.parameters())
    teacher, ternary, again, intervene, strip = Pipeline(
        DuplicateTeacher(), Ternarize(), Ternarize(), Intervene("output"), Strip()
    )(gm).passes
    students = [node for node in bert.graph.graph.nodes if roles.is_student(node)]
    dropouts = [node for node in students if node.op == "call_module"]
    assert teacher.added == len(students) - len(dropouts) - 1  # and no twin for the output
    assert (teacher.removed, teacher.rewired) == (0, 0)
    assert (ternary.added, ternary.removed) == (
        14,
        0,
    )  # six projections a layer, the pooler, the word embedding
    assert ternary.rewired == 14
    assert not again.changed
    assert intervene.added == 2  # one detach a layer
    assert intervene.rewired == 2 * (1 + 3 + 1)  # the tap's line, three projections, one reader
    assert strip.removed == teacher.added + intervene.added
    assert len(gm.graph.nodes) == before + ternary.added
    assert strip.parameters == parameters
    assert all(row.milliseconds > 0 for row in (teacher, ternary, again, intervene, strip))


def test_the_report_as_text(bert: Tiny) -> None:
    report = Pipeline(DuplicateTeacher(), Ternarize(skip=("*.query",)))(bert.fork())
    lines = str(report).splitlines()
    assert lines[0].startswith("1. duplicate-teacher: ")
    assert lines[1].startswith("2. ternarize{skip=*.query}: 12 added, 0 removed, 12 rewired; ")
    assert report.changed


def test_a_pipeline_as_text_names_its_passes() -> None:
    assert str(Pipeline(DuplicateTeacher(), Intervene("map", layers=(0, 2)))) == (
        "duplicate-teacher\nintervene{at=map layers=0,2}"
    )


# ---- what a pipeline is made of


def test_passes_as_text(bert: Tiny) -> None:
    made = Pipeline("duplicate-teacher", Ternarize(), "intervene{at=map}")
    assert made.passes == (DuplicateTeacher(), Ternarize(), Intervene("map"))
    assert Pipeline(str(made)).passes == made.passes
    gm, other = bert.fork(), bert.fork()
    Pipeline("duplicate-teacher\nintervene{at=map}")(gm)
    Pipeline(DuplicateTeacher(), Intervene("map"))(other)
    assert ti_fx.dump(gm) == ti_fx.dump(other)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (
            DuplicateTeacher,
            r"^DuplicateTeacher is a class of passes; give an instance: DuplicateTeacher\(\)$",
        ),
        ([Ternarize()], r"one by one, and this is a list; write Pipeline\(\*passes\)$"),
        (Pipeline(Ternarize()), r"one by one, and this is a Pipeline; write Pipeline\(\*passes\)$"),
        (len, "^builtin_function_or_method is no pass; give an instance"),
        (None, "^NoneType is no pass; give an instance"),
    ],
)
def test_what_is_no_pass(one: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pipeline(one)


def test_a_text_that_names_no_pass() -> None:
    with pytest.raises(RecipeError, match="no pass is called 'intervine'; did you mean 'intervene'"):
        Pipeline("intervine{at=map}")
    with pytest.raises(RecipeError, match="intervene has no option 'att'; did you mean 'at'"):
        Pipeline("intervene{att=map}")


@pytest.mark.slow
def test_passes_of_ti_fx_are_known_in_a_fresh_interpreter() -> None:
    code = "import ti_fx; print(ti_fx.Pipeline('intervene{at=map}'), ti_fx.Pass.parse('pack'))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("intervene{at=map} pack\n", "")
