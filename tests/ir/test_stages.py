"""Each row of a stage's table, broken by hand, and how a Pipeline leads a graph from one stage to another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from models import Tiny, seeded
from raw_graphs import normalised, raw_graph
from torch import Tensor, nn
from torch._higher_order_ops.wrap import wrap_with_autocast
from torch.fx import GraphModule, Node

import ti_fx
from ti_fx import numerics
from ti_fx.errors import PreconditionError, VerificationError
from ti_fx.ir import roles
from ti_fx.ir.edit import call, get_attr, register
from ti_fx.ir.facts import facts, record_facts
from ti_fx.ir.pipeline import Pass, Pipeline
from ti_fx.ir.stages import CAPTURED, PACKED, PHASE, STAGES, Stage
from ti_fx.passes import DuplicateTeacher, Pack, Strip, Ternarize
from ti_fx.passes.normalise import NORMALISE
from ti_fx.passes.normalise.assign_roles import AssignRoles
from ti_fx.passes.normalise.drop_assertions import DropAssertions
from ti_fx.passes.normalise.merge_tied_names import MergeTiedNames
from ti_fx.train.model import FOR_ONE_PHASE

aten = torch.ops.aten


def of_kind(gm: GraphModule, target: object) -> Node:
    nodes: Iterable[Node] = gm.graph.nodes
    return next(node for node in nodes if node.target is target)


def read(gm: GraphModule) -> Node:
    nodes: Iterable[Node] = gm.graph.nodes
    return next(node for node in nodes if node.op == "get_attr")


def norm(gm: GraphModule) -> Node:
    return of_kind(gm, aten.layer_norm.default)


# ---- a row a function


def late(gm: GraphModule) -> None:
    gm.graph.output_node().prepend(norm(gm))


def twice_named(gm: GraphModule) -> None:
    norm(gm).name = of_kind(gm, aten.tanh.default).name


def asserted(gm: GraphModule) -> None:
    call(norm(gm), aten._assert_async.default, (norm(gm).args[0],))


def read_twice(gm: GraphModule) -> None:
    get_attr(norm(gm), str(read(gm).target)).meta["val"] = read(gm).meta["val"]


def without_role(gm: GraphModule) -> None:
    del norm(gm).meta[roles.KEY]


def taught(gm: GraphModule) -> None:
    roles.set_role(gm.graph.output_node(), "teacher")


def untied(gm: GraphModule) -> None:
    weight = norm(gm).args[2]
    assert isinstance(weight, Node)
    record_facts(gm, tied={"first": (str(weight.target),)})


def unevaluated(gm: GraphModule) -> None:
    del norm(gm).meta["val"]


def guarded(gm: GraphModule) -> None:
    record_facts(gm, guards=-1)


def quantised(gm: GraphModule) -> None:
    node = norm(gm)
    source = node.args[0]
    assert isinstance(source, Node)
    call(node, numerics.ternary, (source,), role="student").meta["val"] = source.meta["val"]


BREAK: dict[str, tuple[Callable[[GraphModule], None], str]] = {
    "topological order": (late, "comes later"),
    "lint": (twice_named, "tanh"),
    "operators alone, and checks of decisions": (asserted, "assertion of torch.export"),
    "one read per stored tensor": (read_twice, "a tensor is read by one node"),
    "one role per node": (without_role, "has role None"),
    "the student alone": (taught, "is teacher"),
    "ternary weights are packed": (quantised, "pack stores its codes"),
    "tied weights stay tied": (untied, "is tied to first in the model"),
    "meta present and consistent": (unevaluated, r"no meta\['val'\]"),
    "no guard added": (guarded, "-1 at capture"),
}
# What a Pipeline mends after every pass, or finds before it comes to the table.
MENDED = ("topological order", "lint", "meta present and consistent")


@pytest.fixture(scope="module")
def packed_bert(bert: Tiny) -> GraphModule:
    gm = bert.fork()
    Pipeline(Ternarize(), Strip(), Pack())(gm)
    return gm


@pytest.mark.parametrize(
    ("stage", "row"), [(stage, row.name) for stage in (CAPTURED, PACKED) for row in stage.invariants], ids=str
)
def test_a_broken_row_is_named(stage: Stage, row: str, bert: Tiny, packed_bert: GraphModule) -> None:
    gm = ti_fx.fork({CAPTURED: bert.graph, PACKED: packed_bert}[stage])
    assert facts(gm).stage == stage.name
    ti_fx.verify(gm)
    apply, says = BREAK[row]
    apply(gm)
    with pytest.raises(VerificationError, match=f"^{row}: .*{says}"):
        ti_fx.verify(gm)


def test_a_read_of_no_tensor(bert: Tiny) -> None:
    gm = bert.fork()
    register(gm, "part", nn.Linear(2, 2))
    get_attr(norm(gm), "part").meta["val"] = None
    with pytest.raises(VerificationError, match=r"^operators alone.*%part reads part, which is no tensor"):
        ti_fx.verify(gm)


def test_a_call_of_a_sub_graph(bert: Tiny) -> None:
    gm = bert.fork()
    call(norm(gm), wrap_with_autocast, (), "region").meta["val"] = None
    with pytest.raises(VerificationError, match=r"^operators alone.*%region calls a sub-graph"):
        ti_fx.verify(gm)


# ---- on the way


@dataclass(frozen=True)
class Ruin(Pass):
    """Breaks a row."""

    row: str = ""

    def apply(self, gm: GraphModule) -> None:
        BREAK[self.row][0](gm)


@pytest.mark.parametrize("row", [row.name for row in CAPTURED.invariants if row.name not in MENDED])
def test_a_row_that_held_must_hold_from_then_on(row: str, bert: Tiny) -> None:
    with pytest.raises(VerificationError, match=f"^{row}: ") as caught:
        Pipeline(Ruin(row), Ruin("never reached"), stage=CAPTURED)(bert.fork())
    assert caught.value.__notes__[0].startswith("in pass 1 of 2: ruin")


class Tied(nn.Module):
    """Takes a look-up's table for its head, and asserts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        aten._assert_async.msg(ids.sum() > 0, "positive")
        result: Tensor = self.head(self.embed(ids))
        return result


def raw() -> GraphModule:
    return raw_graph(seeded(Tied), ids=torch.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        (DropAssertions, "operators alone, and checks of decisions: .* is an assertion of torch.export"),
        (MergeTiedNames, r"tied weights stay tied: .*(head|embed)\.weight"),
        (AssignRoles, "one role per node: .* has role None"),
    ],
)
def test_a_graph_that_did_not_get_there(missing: type[Pass], says: str) -> None:
    gm = raw()
    rest = [one for one in NORMALISE.passes if not isinstance(one, missing)]
    with pytest.raises(VerificationError, match=f"^not yet captured: {says}"):
        Pipeline(*rest, stage=CAPTURED)(gm)
    assert facts(gm).stage == "exported"


def test_a_pipeline_without_a_pass_leads_nowhere() -> None:
    gm = raw()
    with pytest.raises(VerificationError, match=r"^not yet captured: "):
        Pipeline(stage=CAPTURED)(gm)
    assert facts(gm).stage == "exported"


def test_a_graph_that_got_there_is_in_that_stage() -> None:
    gm = raw()
    assert facts(gm).stage == "exported"
    report = NORMALISE(gm)
    assert facts(gm).stage == "captured"
    assert [row.name for row in report.passes] == [str(one) for one in NORMALISE.passes]
    ti_fx.verify(gm)


# ---- the wrong stage


def test_an_exported_graph_is_captured_first() -> None:
    with pytest.raises(
        PreconditionError, match=r"ternarize takes .* captured or prepared.*is exported; capture the"
    ):
        Pipeline(Ternarize())(raw())


def test_a_captured_graph_is_ternarised_before_it_is_packed() -> None:
    with pytest.raises(PreconditionError, match="run ternarize first"):
        Pipeline(Pack())(normalised(raw()))


def test_no_pass_of_a_recipe_takes_a_fork_that_was_made_for_one_phase(bert: Tiny) -> None:
    gm = bert.fork()
    Pipeline(DuplicateTeacher(), Ternarize())(gm)
    FOR_ONE_PHASE(gm)
    assert facts(gm).stage == PHASE.name
    ti_fx.verify(gm)
    with pytest.raises(PreconditionError, match="this one is made for one phase; capture the model again"):
        Pipeline(Strip())(gm)


def test_every_stage_is_known_by_its_name() -> None:
    assert list(STAGES) == ["exported", "captured", "prepared", "packed", "lowered", "made for one phase"]
