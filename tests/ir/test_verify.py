"""Each invariant, broken by hand: the verifier names it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from models import Tiny
from torch import nn
from torch.fx import GraphModule, Node

import ti_fx
from ti_fx import numerics
from ti_fx.errors import VerificationError
from ti_fx.find.points import places
from ti_fx.ir import roles
from ti_fx.ir.edit import call, register, tensor
from ti_fx.ir.facts import facts
from ti_fx.ir.shapes import fake_mode
from ti_fx.ir.stages import PREPARED
from ti_fx.passes import DuplicateTeacher, Intervene

aten = torch.ops.aten


@pytest.fixture
def gm(prepared_bert: GraphModule) -> GraphModule:
    """BERT with every prepare pass, the teacher's output in place of the student's."""
    gm = ti_fx.fork(prepared_bert)
    ti_fx.Pipeline(Intervene(at="output"))(gm)
    ti_fx.verify(gm)
    return gm


def first(gm: GraphModule, wanted: Callable[[Node], bool]) -> Node:
    nodes: Iterable[Node] = gm.graph.nodes
    return next(node for node in nodes if wanted(node))


def named(gm: GraphModule, name: str) -> Node:
    return first(gm, lambda node: node.name == name)


def first_call(gm: GraphModule, target: object, role: str = "student") -> Node:
    return first(gm, lambda node: node.target is target and roles.role(node) == role)


def refused(gm: GraphModule, invariant: str, *says: str) -> None:
    with pytest.raises(VerificationError) as caught:
        ti_fx.verify(gm)
    message = str(caught.value)
    assert message.startswith(f"{invariant}: ")
    assert "\n" not in message
    for words in says:
        assert words in message


LINT = "lint"
PLAIN = "operators alone, and checks of decisions"
ORDER = "topological order"
ROLE = "one role per node"
TEACHER_READS = "teacher values are read at intervened points only"
INTERVENTIONS = "interventions and their detaches are present"
BLENDS = "a blend reads its tap, the teacher and its share"
TWINS = "twins compute the same"
FROZEN = "the teacher is frozen"
DROPOUT = "the teacher has no dropout"
QUANTISED = "ternarised weights are read through their quantiser"
PHASED_IN = "a weight that is phased in is read by a share"
TIED = "tied weights stay tied"
LOSSES = "losses are scalar"
MOVED = "a weight that moves is a tensor of its own"
META = "meta present and consistent"
GUARDS = "no guard added"


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    """Those of the other stages, of what is phased in and of what moves are in test files of their own."""
    assert [invariant.name for invariant in PREPARED.invariants] == [
            ORDER, LINT, PLAIN, ROLE, TEACHER_READS, INTERVENTIONS, BLENDS, TWINS, FROZEN, DROPOUT, QUANTISED,
            PHASED_IN, TIED, LOSSES, MOVED, META, GUARDS,
    ]  # fmt: skip


def test_an_assertion_of_the_exporter(gm: GraphModule) -> None:
    node = first_call(gm, aten.layer_norm.default)
    call(node, torch.ops.aten._assert_async.default, (node.args[0],))
    refused(gm, PLAIN, "assertion of torch.export")


def test_lint(gm: GraphModule) -> None:
    first_call(gm, aten.layer_norm.default).name = "loss"  # a name that another node has
    refused(gm, LINT, "loss")


def test_a_missing_tensor(gm: GraphModule) -> None:
    first(gm, lambda node: node.op == "get_attr").target = "no.such.tensor"
    refused(gm, LINT, "no.such.tensor")


def test_a_read_before_its_value(gm: GraphModule) -> None:
    node = first_call(gm, aten.layer_norm.default)
    gm.graph.output_node().prepend(node)
    refused(gm, ORDER, f"%{node.name}", "comes later")


def test_a_node_without_role(gm: GraphModule) -> None:
    node = first_call(gm, aten.softmax.int)
    del node.meta[roles.KEY]
    refused(gm, ROLE, f"%{node.name}", "set_role")


def test_a_shared_node_that_reads_the_student(gm: GraphModule) -> None:
    node = first_call(gm, aten.softmax.int)
    roles.set_role(node, "shared")
    refused(gm, ROLE, f"shared %{node.name}")


def test_a_student_that_reads_the_teacher(gm: GraphModule) -> None:
    node = first_call(gm, aten.softmax.int)
    twin = first_call(gm, aten.softmax.int, "teacher")
    next(iter(node.users)).replace_input_with(node, twin)
    refused(gm, TEACHER_READS, f"reads teacher %{twin.name}", "no intervened point")


def test_a_teacher_that_reads_the_student(gm: GraphModule) -> None:
    node = first_call(gm, aten.softmax.int)
    twin = first_call(gm, aten.softmax.int, "teacher")
    twin.replace_input_with(twin.all_input_nodes[0], node.all_input_nodes[0])
    refused(gm, TEACHER_READS, f"teacher %{twin.name} reads student")


def test_a_student_that_reads_a_loss(gm: GraphModule) -> None:
    loss = named(gm, "loss")
    with gm.graph.inserting_after(loss):
        node = gm.graph.call_function(operator.neg, (loss,))
    roles.set_role(node, "student")
    node.meta["val"] = loss.meta["val"]
    refused(gm, TEACHER_READS, f"student %{node.name} reads loss %loss")


def test_a_student_that_reads_the_tap(gm: GraphModule) -> None:
    site = ti_fx.find_attention(gm)[0]
    assert site.output is not None
    twin = next(twin for twin, node in roles.twins(gm.graph).items() if node is site.output)
    reader = next(user for user in twin.users if roles.is_student(user))
    reader.replace_input_with(twin, site.output)
    refused(gm, INTERVENTIONS, f"%{reader.name} reads the tap %{site.output.name}", "at output")


def test_a_missing_detach(gm: GraphModule) -> None:
    detached = first_call(gm, numerics.detach)
    reader = next(iter(detached.users))
    reader.replace_input_with(detached, detached.all_input_nodes[0])
    refused(gm, INTERVENTIONS, reader.name, "not detached")


def test_a_detach_that_belongs_to_no_intervention(gm: GraphModule) -> None:
    site = ti_fx.find_attention(gm)[0]
    assert site.output is not None
    twin = next(twin for twin, node in roles.twins(gm.graph).items() if node is site.output)
    for user in [user for user in twin.users if roles.is_student(user)]:
        user.replace_input_with(twin, site.output)
    roles.record(site.output, intervened=None, detaches=None)
    refused(gm, INTERVENTIONS, "detach", f"%{site.output.name}")


def test_a_declared_intervention_that_nobody_reads(gm: GraphModule) -> None:
    site = ti_fx.find_attention(gm)[0]
    assert site.output is not None
    assert site.stream is not None
    twin = next(twin for twin, node in roles.twins(gm.graph).items() if node is site.output)
    for user in [user for user in twin.users if roles.is_student(user)]:
        user.replace_input_with(twin, site.stream)
    refused(gm, INTERVENTIONS, f"%{twin.name}", "no student")


@pytest.fixture
def blended(prepared_bert: GraphModule) -> GraphModule:
    """BERT whose layers read a blend, and its maps another one; tokens draw at feed-forward blocks."""
    gm = ti_fx.fork(prepared_bert)
    ti_fx.Pipeline(Intervene("map+layer", blend=True))(gm)
    ti_fx.verify(gm)
    return gm


def layer_tap(gm: GraphModule) -> tuple[Node, Node]:
    """Return what the second layer reads, and its twin."""
    tap = places(gm, "layer")[1].tap
    assert tap is not None
    return tap, roles.twin_of(gm.graph)[tap]


def a_blend(gm: GraphModule, tap: Node) -> Node:
    return first(gm, lambda node: node.target is numerics.blend and node.args[0] is tap)


def test_a_blended_tap_that_is_read_beside_its_blend(blended: GraphModule) -> None:
    tap, _ = layer_tap(blended)
    node = a_blend(blended, tap)
    reader = next(iter(node.users))
    reader.replace_input_with(node, tap)
    refused(blended, INTERVENTIONS, f"%{reader.name} reads the tap %{tap.name}", "at layer")


def test_a_teacher_that_is_read_beside_the_blend(blended: GraphModule) -> None:
    tap, twin = layer_tap(blended)
    node = a_blend(blended, tap)
    reader = next(iter(node.users))
    reader.replace_input_with(node, twin)
    refused(
        blended, BLENDS, f"%{reader.name} reads the teacher's %{twin.name} beside the blend at %{tap.name}"
    )


def test_a_blend_of_another_sites_value(blended: GraphModule) -> None:
    tap, _ = layer_tap(blended)
    other = places(blended, "layer")[0].tap
    node = a_blend(blended, tap)
    node.args = (tap, roles.twin_of(blended.graph)[other], node.args[2])  # type: ignore[index]
    refused(blended, BLENDS, f"%{node.name} must blend the tap %{tap.name}")


def test_a_blend_by_another_sites_share(blended: GraphModule) -> None:
    tap, _ = layer_tap(blended)
    other = places(blended, "layer")[0].tap
    assert other is not None
    node = a_blend(blended, tap)
    node.args = (*node.args[:2], a_blend(blended, other).args[2])
    refused(blended, BLENDS, f"%{node.name} takes %{other.name}_share", f"blend.{tap.name}")


def test_a_share_that_is_trained(blended: GraphModule) -> None:
    tap, _ = layer_tap(blended)
    held = blended.get_submodule("blend")
    value = held._buffers.pop(tap.name)
    assert value is not None
    held.register_parameter(tap.name, nn.Parameter(value))
    refused(blended, BLENDS, f"blend.{tap.name}", "nothing trains")


def test_a_blend_that_belongs_to_no_intervention(blended: GraphModule) -> None:
    tap, _ = layer_tap(blended)
    roles.record(tap, blended=None)
    refused(blended, INTERVENTIONS, tap.name)
    roles.record(tap, intervened=None)
    refused(blended, TEACHER_READS, "no intervened point")


def test_a_partial_detach_that_is_missing(blended: GraphModule) -> None:
    node = first_call(blended, numerics.detach_by)
    reader = next(iter(node.users))
    reader.replace_input_with(node, node.all_input_nodes[0])
    refused(blended, INTERVENTIONS, reader.name, "not detached")


def test_a_partial_detach_by_another_share(blended: GraphModule) -> None:
    *_, node = blended.graph.find_nodes(op="call_function", target=numerics.detach_by)
    tap = places(blended, "layer")[0].tap
    assert tap is not None
    node.args = (node.args[0], a_blend(blended, tap).args[2])
    refused(blended, BLENDS, f"%{node.name} takes %{tap.name}_share")


@pytest.mark.parametrize("blend", [False, True, "tokens"])
def test_a_users_own_point(prepared_bert: GraphModule, blend: Any) -> None:
    gm = ti_fx.fork(prepared_bert)
    tap = first_call(gm, aten.gelu.default)
    ti_fx.Pipeline(Intervene(f"node:{tap.name}", blend=blend))(gm)
    ti_fx.verify(gm)
    node = first(gm, lambda one: one.name == tap.name)
    read = a_blend(gm, node) if blend else roles.twin_of(gm.graph)[node]
    reader = next(user for user in read.users if roles.is_student(user))
    reader.replace_input_with(read, node)
    refused(gm, INTERVENTIONS, f"%{reader.name} reads the tap %{node.name}", f"node:{node.name}")


def test_another_constant_in_a_twin(gm: GraphModule) -> None:
    twin = first_call(gm, aten.layer_norm.default, "teacher")
    twin.args = (*twin.args[:-1], 1.0) if len(twin.args) > 4 else (*twin.args, 1.0)
    refused(gm, TWINS, f"%{twin.name}", "constants")


def test_another_op_in_a_twin(gm: GraphModule) -> None:
    twin = first_call(gm, aten.gelu.default, "teacher")
    twin.target = aten.relu.default
    refused(gm, TWINS, f"%{twin.name}", "another op")


def test_another_tensor_in_a_twin(gm: GraphModule) -> None:
    reads = [node for node in gm.graph.find_nodes(op="get_attr") if roles.is_teacher(node)]
    one, other = [node for node in reads if str(node.target).endswith("query.weight")][:2]
    one.target = other.target
    refused(gm, TWINS, str(other.target))


def test_a_student_whose_op_was_replaced(gm: GraphModule) -> None:
    node = first_call(gm, aten.gelu.default)
    node.target = aten.relu.default
    refused(gm, TWINS, f"%{node.name}", "another op")


def test_a_teacher_that_is_trained(gm: GraphModule) -> None:
    node = first(gm, lambda node: node.op == "get_attr" and str(node.target).endswith("query.weight"))
    node = first(gm, lambda other: other.target == f"teacher.{node.target}")
    frozen = tensor(gm, str(node.target))
    frozen.requires_grad_(True)
    try:
        refused(gm, FROZEN, str(node.target))
    finally:
        frozen.requires_grad_(False)  # the tensors are shared with the session's graph


def test_a_teacher_that_reads_the_students_own_parameter(gm: GraphModule) -> None:
    node = first(gm, lambda node: node.op == "get_attr" and roles.is_teacher(node))
    node.target = str(node.target).removeprefix("teacher.")
    refused(gm, TWINS, node.target)


def test_a_teacher_with_dropout(gm: GraphModule) -> None:
    register(gm, "teacher_dropout", nn.Dropout(0.1))
    node = first_call(gm, aten.softmax.int, "teacher")
    with gm.graph.inserting_after(node):
        dropped = gm.graph.call_module("teacher_dropout", (node,))
    dropped.meta["val"] = node.meta["val"]
    roles.set_role(dropped, "teacher")
    refused(gm, DROPOUT, f"%{dropped.name}")


def test_a_teacher_with_functional_dropout(gm: GraphModule) -> None:
    node = first_call(gm, aten.softmax.int, "teacher")
    with gm.graph.inserting_after(node):
        dropped = gm.graph.call_function(aten.dropout.default, (node, 0.1, True))
    dropped.meta["val"] = node.meta["val"]
    roles.set_role(dropped, "teacher")
    refused(gm, DROPOUT, f"%{dropped.name}")


def test_a_teacher_whose_leaf_follows_train(plain: Tiny) -> None:
    gm = plain.fork()
    ti_fx.Pipeline(DuplicateTeacher())(gm)
    node = first(gm, lambda node: node.op == "call_module" and roles.is_teacher(node))
    register(gm, str(node.target), gm.get_submodule(str(node.target).removeprefix("teacher.")))
    refused(gm, FROZEN, f"%{node.name}", "eval")


def test_a_ternarised_weight_that_is_read_beside_its_quantiser(gm: GraphModule) -> None:
    quantiser = first_call(gm, numerics.ternary)
    reader = next(iter(quantiser.users))
    latent = quantiser.all_input_nodes[0]
    reader.replace_input_with(quantiser, latent)
    refused(gm, QUANTISED, f"%{reader.name}", str(latent.target))


def test_an_exempted_read_beside_the_quantiser(gm: GraphModule) -> None:
    quantiser = first_call(gm, numerics.ternary)
    latent = quantiser.all_input_nodes[0]
    with gm.graph.inserting_after(latent):
        reader = call(latent.next, aten.abs.default, (latent,), "magnitude", "loss")
    reader.meta["val"] = latent.meta["val"]
    refused(gm, QUANTISED, "%magnitude")
    roles.record(reader, exempt=[latent.target])
    ti_fx.verify(gm)


def test_two_names_of_one_parameter(bert: Tiny) -> None:
    gm = bert.fork()
    reads = [node for node in gm.graph.find_nodes(op="get_attr") if node.target.endswith("query.weight")]
    parameter = tensor(gm, reads[0].target)
    register(gm, "second_name", parameter)
    try:
        reads[1].target = "second_name"
        refused(gm, TIED, "second_name", reads[0].target)
    finally:
        del gm._parameters["second_name"]


def test_a_retied_weight_that_became_a_tensor_of_its_own(gpt2: Tiny) -> None:
    gm = gpt2.fork()
    assert facts(gm).tied == {"transformer.wte.weight": ("lm_head.weight",)}
    table = first(gm, lambda node: node.target == "transformer.wte.weight")
    register(gm, "lm_head.weight", nn.Parameter(tensor(gm, "transformer.wte.weight").detach().clone()))
    head = list(table.users)[-1]
    with gm.graph.inserting_before(head):
        own = gm.graph.get_attr("lm_head.weight")
    own.meta["val"] = table.meta["val"]
    roles.set_role(own, "student")
    head.replace_input_with(table, own)
    refused(gm, TIED, "lm_head.weight", "transformer.wte.weight")


def test_a_loss_that_is_no_scalar(gm: GraphModule) -> None:
    output = gm.graph.output_node()
    result = output.args[0]
    assert isinstance(result, dict)
    vector = first_call(gm, aten.softmax.int)
    output.args = ({**result, "losses": {**result["losses"], "logits": vector}},)
    refused(gm, LOSSES, "logits", vector.name)


def test_missing_meta(gm: GraphModule) -> None:
    node = first_call(gm, aten.softmax.int)
    del node.meta["val"]
    refused(gm, META, f"%{node.name}", "Pipeline")


def test_wrong_meta(gm: GraphModule) -> None:
    node = first_call(gm, aten.softmax.int)
    with fake_mode(gm):
        node.meta["val"] = torch.empty(2, 2)
    refused(gm, META, f"%{node.name}", "Pipeline")


def test_an_added_guard() -> None:
    model = nn.Linear(4, 2)
    gm = ti_fx.capture(model, {"input": torch.zeros(3, 4)})
    ti_fx.verify(gm)
    batch = gm.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]
    assert batch > 2 or batch  # a decision about a size in Python guards on it
    refused(gm, GUARDS)
