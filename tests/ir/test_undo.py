"""A pipeline that fails leaves the graph as it was before: nodes, facts, tensors and their values, modes, sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from models import Tiny
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import ti_fx
from ti_fx import Pass, Recipe
from ti_fx.errors import PreconditionError
from ti_fx.ir import roles
from ti_fx.ir.edit import erase, register
from ti_fx.ir.facts import facts, record_facts
from ti_fx.ir.shapes import guard_count
from ti_fx.passes import Distill, DuplicateTeacher, Intervene, QuantizeActivations, Strip, Ternarize

aten = torch.ops.aten
WORDS = "bert.embeddings.word_embeddings.weight"


def state(gm: GraphModule) -> dict[str, Any]:
    """All that a user can see of a graph."""
    tensors = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    return {
        "dump": ti_fx.dump(gm),
        "facts": facts(gm),
        "identity": {name: id(value) for name, value in tensors.items()},
        "values": {name: value.detach().clone() for name, value in tensors.items()},
        "frozen": {name: value.requires_grad for name, value in tensors.items()},
        "persistent": list(gm.state_dict()),
        "modules": [(name, id(module)) for name, module in gm.named_modules() if not list(module.children())],
        "modes": [module.training for module in gm.modules()],
        "guards": guard_count(gm),
        "code": gm.code,
    }


def assert_as_before(gm: GraphModule, before: dict[str, Any]) -> None:
    after = state(gm)
    for key, value in before.items():
        if key == "values":
            assert all(torch.equal(after[key][name], one) for name, one in value.items())
        else:
            assert after[key] == value, key
    ti_fx.verify(gm)


def first(gm: GraphModule, target: Callable[..., Any]) -> Node:
    found: Node = gm.graph.find_nodes(op="call_function", target=target)[0]
    return found


def rewrite(gm: GraphModule) -> None:
    node = first(gm, aten.gelu.default)
    node.target = aten.relu.default
    node.name = "another_name"
    roles.record(node, seen=True)
    erase_last = first(gm, aten.tanh.default)
    erase_last.replace_all_uses_with(erase_last.all_input_nodes[0])
    erase(erase_last)


def tensors(gm: GraphModule) -> None:
    register(gm, "bert.encoder.another", nn.Parameter(torch.ones(2)))
    register(gm, WORDS, nn.Parameter(torch.zeros(1100, 16)))
    del gm.get_submodule("classifier")._parameters["bias"]
    gm.get_submodule("bert.encoder").more = nn.Linear(2, 2)
    gm.add_module("teacher", nn.Module())


def values(gm: GraphModule) -> None:
    with torch.no_grad():
        gm.get_parameter(WORDS).mul_(2)
        gm.get_parameter("classifier.weight").data[0, 0] = 7.0
        gm.get_parameter("classifier.bias").data = torch.ones(3)
        gm.get_parameter("bert.pooler.dense.weight").view(-1)[3:5].zero_()


def modes(gm: GraphModule) -> None:
    gm.eval()
    gm.requires_grad_(False)
    record_facts(gm, task=2.0)


def sizes(gm: GraphModule) -> None:
    value = gm.graph.find_nodes(op="placeholder")[0].meta["val"]
    assert value.shape[0] == 3  # an assumption about the batch
    assert value.shape[1] > 5


EDITS = [rewrite, tensors, values, modes, sizes]


@dataclass(frozen=True)
class Refused(Pass):
    """Edits, then fails."""

    edit: Callable[[GraphModule], None] = field(compare=False)
    error: BaseException = field(default_factory=lambda: KeyError("no"), compare=False)

    def apply(self, gm: GraphModule) -> None:
        self.edit(gm)
        raise self.error


@pytest.mark.parametrize("edit", EDITS)
def test_a_pass_that_fails_changes_nothing(bert: Tiny, edit: Callable[[GraphModule], None]) -> None:
    gm = copy.deepcopy(bert.graph)
    before = state(gm)
    with pytest.raises(KeyError):
        Refused(edit)(gm)
    assert_as_before(gm, before)
    with pytest.raises(KeyError) as caught:
        ti_fx.Pipeline(DuplicateTeacher(), Ternarize(), Intervene("map"), Refused(edit))(gm)
    assert caught.value.__notes__[0].startswith("in pass 4 of 4: refused")
    assert_as_before(gm, before)


def test_and_can_be_prepared_afterwards_as_if_nothing_had_happened(bert: Tiny) -> None:
    gm, fresh = copy.deepcopy(bert.graph), copy.deepcopy(bert.graph)
    fork = ti_fx.fork(gm)
    for edit in EDITS:
        with pytest.raises(KeyError):
            ti_fx.Pipeline(DuplicateTeacher(), Refused(edit))(gm)
    with pytest.raises(PreconditionError, match="finds no attention mask"):
        Recipe("no mask", distill=Distill(mask_padding=True)).prepare(_without_mask(gm))
    passes = (DuplicateTeacher(), Ternarize(), QuantizeActivations(), Distill(), Intervene("output"))
    for one in (gm, fresh):
        ti_fx.Pipeline(*passes)(one)
    assert ti_fx.dump(gm) == ti_fx.dump(fresh)
    assert torch.equal(gm.eval()(**bert.example)["loss"], fresh.eval()(**bert.example)["loss"])
    assert ti_fx.dump(fork) == ti_fx.dump(bert.graph)


def _without_mask(gm: GraphModule) -> GraphModule:
    fork = ti_fx.fork(gm)
    for node in ti_fx.find_attention(fork):
        assert node.scores is not None
        if aten.add.Tensor is node.scores.target:
            node.scores.replace_all_uses_with(node.scores.all_input_nodes[0])
    return fork


def test_an_interrupt(bert: Tiny) -> None:
    gm = copy.deepcopy(bert.graph)
    before = state(gm)
    with pytest.raises(KeyboardInterrupt):
        ti_fx.Pipeline(DuplicateTeacher(), Refused(rewrite, KeyboardInterrupt()))(gm)
    assert_as_before(gm, before)


def test_a_check_that_fails(bert: Tiny) -> None:
    @dataclass(frozen=True)
    class Mixed(Pass):
        """The student reads the teacher where there is no intervention; only the verifier sees it."""

        def apply(self, gm: GraphModule) -> None:
            teacher = next(
                twin for twin, node in roles.twins(gm.graph).items() if node.target is aten.gelu.default
            )
            student = roles.twins(gm.graph)[teacher]
            student.replace_all_uses_with(teacher)

    gm = copy.deepcopy(bert.graph)
    before = state(gm)
    with pytest.raises(ti_fx.errors.VerificationError, match="at no intervened point"):
        ti_fx.Pipeline(DuplicateTeacher(), Mixed())(gm)
    assert_as_before(gm, before)


class Foreign(PassBase):
    """A pass of torch.fx that returns another module, over other tensors, which the verifier refuses."""

    def call(self, graph_module: GraphModule) -> PassResult:
        made = copy.deepcopy(graph_module)
        values(made)
        values(graph_module)
        first(made, aten.gelu.default).target = aten.sum.default
        return PassResult(made, True)


def test_a_foreign_pass(bert: Tiny) -> None:
    gm = copy.deepcopy(bert.graph)
    before = state(gm)
    with pytest.raises(ti_fx.errors.TiFxError):
        ti_fx.Pipeline(Foreign())(gm)
    assert_as_before(gm, before)


def test_a_graph_in_an_order_that_is_not_yet_sorted(bert: Tiny) -> None:
    gm = bert.fork()
    softmax = first(gm, aten.softmax.int)
    next(iter(gm.graph.nodes)).prepend(softmax)  # edited by hand: a pipeline sorts it
    with pytest.raises(KeyError):
        Refused(rewrite)(gm)
    ti_fx.Pipeline(Strip())(gm)
    ti_fx.verify(gm)
    assert len(gm.graph.nodes) == len(bert.graph.graph.nodes)
