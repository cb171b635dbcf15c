"""A lowered graph can be looked at like any other, and the one that it was made of is left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lowering_models import Small, packed_small, small_example
from models import Tiny
from slow import slow
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult

import ti_fx
from ti_fx.errors import ExportError, InputError, PreconditionError, VerificationError
from ti_fx.export import lower, to_onnx
from ti_fx.ir.edit import register
from ti_fx.ir.facts import record_facts
from ti_fx.ir.pipeline import Pass, Pipeline, name_of
from ti_fx.ir.shapes import fake_mode, guard_count
from ti_fx.ir.stages import LOWERED, PACKED, stage_of
from ti_fx.numerics.quantisers.int8_token import quantise_token
from ti_fx.passes import DecomposeAttention, Pack, QuantizeActivations, Ternarize
from ti_fx.passes.lower import (
    LOWER,
    DequantiseWeights,
    LookUpPacked,
    MultiplyBlocks,
    MultiplyIntegers,
    operators,
)
from ti_fx.view import to_networkx

aten = torch.ops.aten


def packed(tiny: Tiny, encoding: str = "int8-token", attention: bool = False) -> GraphModule:
    gm = tiny.fork()
    quantise = QuantizeActivations(encoding=encoding, attention=attention)
    ti_fx.Pipeline(DecomposeAttention(), Ternarize(), quantise, Pack())(gm)
    return gm


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("encoding", ["int8-token", "nbits2-32", "base3"])
def test_a_lowered_graph_is_one_of_its_own(bert: Tiny, encoding: str, attention: bool) -> None:
    gm = packed(bert, encoding, attention)
    before, names, guards = ti_fx.dump(gm), set(dict(gm.named_buffers())), guard_count(gm)
    lowered = lower(gm)
    assert ti_fx.dump(gm) == before
    assert set(dict(gm.named_buffers())) == names
    assert guard_count(gm) == guards
    assert stage_of(gm) is PACKED
    assert stage_of(lowered) is LOWERED
    ti_fx.verify(gm)
    ti_fx.verify(lowered)  # every value is evaluated again
    assert "#" not in ti_fx.dump(lowered)
    assert ti_fx.diff(gm, lowered)
    assert len(to_networkx(lowered)) == len(lowered.graph.nodes)


@pytest.mark.parametrize("kind", ["llama", *slow("t5")])
def test_other_architectures_are_lowered_without_a_guard(kind: str, request: pytest.FixtureRequest) -> None:
    gm = packed(request.getfixturevalue(kind))
    guards = guard_count(gm)
    ti_fx.verify(lower(gm))
    assert guard_count(gm) == guards


def test_the_opset_decides_what_is_fused(bert: Tiny) -> None:
    gm = packed(bert, "float")
    assert operators.attention in {node.target for node in lower(gm).graph.nodes}
    older = lower(gm, 24)
    assert operators.attention not in {node.target for node in older.graph.nodes}
    assert "int2" not in ti_fx.dump(older)


def test_what_can_not_be_lowered_is_refused(bert: Tiny) -> None:
    with pytest.raises(PreconditionError, match="no packed ternary weight"):
        lower(bert.fork())
    gm = packed(bert)
    with pytest.raises(InputError, match="opset is 17; use 18 to 25"):
        lower(gm, 17)
    with pytest.raises(ExportError, match="needs opset 21 or newer, and opset=18 was asked for") as caught:
        lower(gm, 18)
    assert "in pass 9 of 20: multiply-integers" in caught.value.__notes__[0]


def test_a_weight_that_is_not_float32_is_refused() -> None:
    gm = ti_fx.capture(Small().double(), small_example())
    ti_fx.Pipeline(Ternarize(), Pack())(gm)
    with pytest.raises(ExportError, match=r"packed weight .* is torch.float64; export needs float32"):
        lower(gm)


def test_a_complex_number_that_is_read_without_a_rule_is_refused() -> None:
    class Turned(Small):
        def forward(self, ids: Tensor) -> Tensor:
            pairs = torch.view_as_complex(super().forward(ids).reshape(*ids.shape, -1, 2))
            return torch.view_as_real(pairs.conj().resolve_conj() + 1)

    class Length(Small):
        def forward(self, ids: Tensor) -> Tensor:
            return torch.view_as_complex(super().forward(ids).reshape(*ids.shape, -1, 2)).abs()

    for model in (Turned(), Length()):
        gm = ti_fx.capture(model, small_example())
        ti_fx.Pipeline(Ternarize(), Pack())(gm)
        with pytest.raises(ExportError, match="computes with complex numbers, which ONNX lacks"):
            lower(gm)


@pytest.mark.parametrize("one", [LookUpPacked(), MultiplyBlocks(), MultiplyIntegers(), DequantiseWeights()])
def test_a_pass_that_reads_layouts_says_which_pass_is_missing(one: Pass) -> None:
    with pytest.raises(PreconditionError, match=f"{one.name()} reads .*; run choose-layouts first"):
        Pipeline(one)(packed_small())


@pytest.mark.parametrize("one", LOWER.passes, ids=name_of)
def test_a_lowering_pass_takes_a_packed_graph_alone(one: Pass, bert: Tiny) -> None:
    with pytest.raises(
        PreconditionError, match=f"{one.name()} takes a graph that is packed, and this one is"
    ):
        Pipeline(one)(bert.fork())


def test_names_of_passes_are_their_own() -> None:
    names = [name_of(one) for one in LOWER.passes]
    assert len(set(names)) == len(names)
    assert [str(Pass.parse(name)) for name in names] == names
    assert str(LOWER).splitlines() == names


@dataclass(frozen=True)
class Negate(Pass):
    """A user's pass: ``relu`` in the place of ``mul``."""

    takes = (PACKED,)

    def apply(self, gm: GraphModule) -> None:
        """Rewrite every product."""
        for node in gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            node.target, node.args = aten.relu.default, node.args[:1]


class Foreign(PassBase):
    """A pass of torch.fx's own kind that changes nothing."""

    def call(self, graph_module: GraphModule) -> PassResult:
        return PassResult(graph_module, False)


def test_a_users_own_pass_stands_anywhere_in_the_pipeline() -> None:
    packed_graph = packed_small()
    for position in (0, 5, len(LOWER.passes) - 1):
        gm = ti_fx.fork(packed_graph)
        passes = (*LOWER.passes[:position], Negate(), Foreign(), *LOWER.passes[position:])
        report = Pipeline(*passes, stage=LOWERED)(gm)
        assert report.passes[position].name == "negate"
        assert report.passes[position].changed
        assert stage_of(gm) is LOWERED
        ti_fx.verify(gm)


def test_a_graph_that_is_not_lowered_all_the_way_is_refused() -> None:
    with pytest.raises(VerificationError, match="not yet lowered: no role: "):
        Pipeline(*LOWER.passes[:-1], stage=LOWERED)(packed_small())


def test_the_text_before_and_after_each_pass_is_written(tmp_path: Path) -> None:
    gm = packed_small()
    to_onnx(gm, tmp_path / "small.onnx", small_example(), dump_dir=tmp_path / "texts")
    files = sorted(file.name for file in (tmp_path / "texts").iterdir())
    names = ["packed", *map(name_of, LOWER.passes)]
    assert files == [f"{position:02}-{name}.txt" for position, name in enumerate(names)]
    written = (tmp_path / "texts" / files[-1]).read_text().splitlines()
    assert written[:-1] == ti_fx.dump(lower(gm)).splitlines()[:-1]  # a file's graph returns a tuple


# What breaks each row of LOWERED in a graph that keeps them all.
def _out_of_order(gm: GraphModule) -> None:
    node = next(iter(gm.graph.find_nodes(op="call_function", target=operators.integer_linear)))
    gm.graph._root.append(node)


def _unread_module(gm: GraphModule) -> None:
    node = gm.graph.output_node()
    with gm.graph.inserting_before(node):
        gm.graph.create_node("call_module", "nowhere", ())


def _no_tensor(gm: GraphModule) -> None:
    gm.__dict__["settings"] = 3
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.create_node("get_attr", "settings")


def _role(gm: GraphModule) -> None:
    ti_fx.ir.roles.set_role(next(iter(gm.graph.nodes)), "student")


def _training(gm: GraphModule) -> None:
    register(gm, "late", nn.Dropout())
    source = gm.graph.output_node().all_input_nodes[0]
    with gm.graph.inserting_after(source):
        gm.graph.create_node("call_module", "late", (source,)).meta["val"] = source.meta["val"]


def _fake_quantiser(gm: GraphModule) -> None:
    _insert(gm, ti_fx.numerics.int8_tensor)


def _complex(gm: GraphModule) -> None:
    node = _insert(gm, aten.abs.default)
    with fake_mode(gm):
        node.meta["val"] = torch.zeros(2, dtype=torch.complex64)


def _unknown(gm: GraphModule) -> None:
    _insert(gm, ti_fx.numerics.pack_codes)


def _newer(gm: GraphModule) -> None:
    record_facts(gm, opset=20)
    _insert(gm, quantise_token)


def _no_value(gm: GraphModule) -> None:
    del next(iter(gm.graph.nodes)).meta["val"]


def _other_value(gm: GraphModule) -> None:
    node = next(iter(gm.graph.find_nodes(op="call_function", target=operators.integer_linear)))
    node.meta["val"] = node.meta["val"].to(torch.int32)


def _insert(gm: GraphModule, target: Callable[..., object]) -> torch.fx.Node:
    output = gm.graph.output_node()
    source = output.all_input_nodes[0]
    with gm.graph.inserting_before(output):
        node = gm.graph.call_function(target, (source,))
    node.meta["val"] = source.meta["val"]
    return node


@pytest.mark.parametrize(
    ("invariant", "breaks", "says"),
    [
        ("topological order", _out_of_order, "which comes later"),
        ("lint", _unread_module, "nowhere"),
        ("operators alone, and checks of decisions", _no_tensor, "which is no tensor of the graph"),
        ("no role", _role, "is student; a lowered graph has nothing to train"),
        ("nothing that only training needs", _training, "is dropout"),
        ("nothing that only training needs", _fake_quantiser, "calls int8_tensor"),
        ("real numbers alone", _complex, "is complex"),
        ("only what the opset has", _unknown, "calls pack_codes, which no ONNX operator is"),
        ("only what the opset has", _newer, "needs opset 21 or newer"),
        ("meta present and consistent", _no_value, "has no meta"),
        ("meta present and consistent", _other_value, "no longer has the shape or dtype"),
    ],
)
def test_each_row_of_the_stage_is_checked(
    invariant: str, breaks: Callable[[GraphModule], None], says: str
) -> None:
    lowered = lower(packed_small())
    ti_fx.verify(lowered)
    breaks(lowered)
    with pytest.raises(VerificationError, match=f"^{invariant}: .*{says}"):
        ti_fx.verify(lowered)


def test_every_row_of_the_stage_is_broken_above() -> None:
    (mark,) = test_each_row_of_the_stage_is_checked.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in mark.args[1]} == {row.name for row in LOWERED.invariants}


def test_values_keep_the_packed_graphs_names_in_the_lowered_one() -> None:
    gm = packed_small()
    lowered = lower(gm)
    kinds = {node.name: node.meta["val"] for node in gm.graph.nodes if node.op == "call_function"}
    for node in lowered.graph.nodes:
        if node.name in kinds:
            assert node.meta["val"].shape == kinds[node.name].shape
    assert {"embedding", "linear", "linear_1", "add", "layer_norm"} <= {n.name for n in lowered.graph.nodes}
