"""Pipelines: foreign passes, failures with their place, reports, refusals, interventions on fused projections."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import PlainTransformer, Tiny, bert_model, prepared, seeded, tokens, vit_model
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import ti_fx
from ti_fx.errors import (
    InputError,
    PostconditionError,
    PreconditionError,
    SelectionError,
    TiFxError,
    VerificationError,
)
from ti_fx.ir import roles
from ti_fx.ir.edit import tensor
from ti_fx.ir.pipeline import Pass, Pipeline
from ti_fx.ir.shapes import evaluate, signature
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


# ---- refusals of each pass

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
    "an unknown point": ((DuplicateTeacher(),), Intervene("layer"), SelectionError, "can't act at 'layer'"),
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


# ---- interventions, by value and gradient


class Recorder(Interpreter):
    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def run_recorded(gm: GraphModule, example: dict[str, Tensor]) -> dict[str, Any]:
    torch.manual_seed(0)
    recorder = Recorder(gm)
    recorder.run(*example.values())
    return recorder.values


@pytest.mark.parametrize("at", ["map", "context", "output"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_consumers_read_the_teachers_value_and_the_tap_keeps_the_students(
    name: str, at: str, request: pytest.FixtureRequest
) -> None:
    tiny: Tiny = request.getfixturevalue(name)
    gm = prepared(tiny)
    sites = ti_fx.find_attention(gm)
    teacher = {node.name: twin.name for twin, node in roles.twins(gm.graph).items()}
    before = run_recorded(gm, tiny.example)
    Pipeline(Intervene(at))(gm)
    after = run_recorded(gm, tiny.example)
    for site in sites:
        tap = site.at(at)
        assert tap is not None
        twin = teacher[tap.name]
        assert not torch.equal(after[tap.name], after[twin])
        assert torch.equal(after[twin], before[twin])
        assert all(not roles.is_student(user) for user in tap.users)
    # up to the first intervened point the student is what it was
    first = sites[0].at(at)
    assert first is not None
    assert torch.equal(after[first.name], before[first.name])


def test_map_on_a_fused_projection_splits_the_gradient(gpt2: Tiny) -> None:
    """GPT-2's Q, K and V are one addmm: V's input keeps its gradient under TI-M, Q's and K's is cut."""
    gm = copy.deepcopy(gpt2.graph).train(False)
    Pipeline(DuplicateTeacher())(gm)
    base = ti_fx.dump(gm)
    reference = gm(**gpt2.example).logits
    Pipeline(Intervene("map"))(gm)
    # nothing is quantised yet, so the teacher's map is the student's: forward values are equal
    assert torch.equal(gm(**gpt2.example).logits, reference)
    site = ti_fx.find_attention(gm)[0]
    assert site.map is not None
    assert site.query is site.key is site.value

    # 1. the outputs: nothing flows through the map, all of V's part flows
    name = "transformer.h.0.attn.c_attn.weight"
    gm(**gpt2.example).logits.square().sum().backward()
    gradient = tensor(gm, name).grad
    assert gradient is not None
    query_key, value = gradient[:, :32], gradient[:, 32:]
    assert torch.equal(query_key, torch.zeros_like(query_key))
    assert value.abs().max() > 0
    below = tensor(gm, "transformer.wpe.weight").grad
    assert below is not None
    gm.zero_grad(set_to_none=True)

    # 2. the tap: its projections are trained, what feeds them is not
    values = run_recorded(gm, gpt2.example)
    values[site.map.name].square().sum().backward()
    gradient = tensor(gm, name).grad
    assert gradient is not None
    assert gradient[:, :32].abs().max() > 0
    assert torch.equal(gradient[:, 32:], torch.zeros_like(value))
    assert tensor(gm, "transformer.wpe.weight").grad is None
    assert tensor(gm, "transformer.h.0.ln_1.weight").grad is None
    gm.zero_grad(set_to_none=True)

    Pipeline(Intervene())(gm)
    assert ti_fx.dump(gm) == base


@pytest.mark.parametrize("at", ["map", "context", "output"])
def test_what_a_loss_at_the_tap_trains(at: str, bert: Tiny) -> None:
    gm = copy.deepcopy(bert.graph).train(False)
    Pipeline(DuplicateTeacher(), Intervene(at))(gm)
    site = ti_fx.find_attention(gm)[1]
    tap = site.at(at)
    assert tap is not None
    values = run_recorded(gm, bert.example)
    values[tap.name].square().sum().backward()
    trained = {
        name.removeprefix("bert.encoder.layer.1.attention.").removesuffix(".weight")
        for name, parameter in gm.named_parameters()
        if parameter.grad is not None and name.endswith("weight")
    }
    expected = {
        "map": {"self.query", "self.key"},
        "context": {"self.query", "self.key", "self.value"},
        "output": {"self.query", "self.key", "self.value", "output.dense"},
    }
    assert trained == expected[at]


def test_the_encoders_gradient_can_be_kept(t5: Tiny) -> None:
    gm = copy.deepcopy(t5.graph).train(False)
    Pipeline(DuplicateTeacher())(gm)
    found = {}
    for keep in (False, True):
        Pipeline(Intervene("output", kind="cross", keep_encoder_gradient=keep))(gm)
        tap = ti_fx.find_attention(gm)[-1].output
        assert tap is not None
        gm.zero_grad(set_to_none=True)
        run_recorded(gm, t5.example)[tap.name].square().sum().backward()
        grads = {name for name, parameter in gm.named_parameters() if parameter.grad is not None}
        found[keep] = {
            tower
            for tower in ("encoder", "decoder")
            if any(name.startswith(f"{tower}.block") and ".SelfAttention." in name for name in grads)
        }
    assert found == {False: set(), True: {"encoder"}}


# ---- the teacher


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
