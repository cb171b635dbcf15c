"""The points beside attention, values of one's own, and blends: who reads the teacher, and the laws of every pass."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from models import Tiny, bert_model, prepared, text_example
from recorder import run_recorded
from slow import slow
from torch import nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.errors import PreconditionError, SelectionError
from ti_fx.find.points import POINTS, places
from ti_fx.ir import roles
from ti_fx.ir.blends import set_shares, shares
from ti_fx.ir.pipeline import Pass, Pipeline
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

PASSES = (
    Intervene(),
    Intervene("map", blend=True),
    Intervene("layer", blend=True),
    Intervene("ffn"),
    Intervene("layer+ffn", blend="tokens"),
)


@pytest.fixture(scope="module", params=["bert", *slow("t5", "gpt2", "llama", "vit")])
def ready(request: pytest.FixtureRequest) -> tuple[Tiny, GraphModule]:
    """Each model with everything but an intervention; tests fork it."""
    tiny: Tiny = request.getfixturevalue(request.param)
    return tiny, prepared(tiny)


def run(gm: GraphModule, *passes: Pass) -> str:
    fork = ti_fx.fork(gm)
    Pipeline(*passes)(fork)
    return ti_fx.dump(fork)


@pytest.mark.parametrize("point", ["layer", "ffn"])
def test_every_consumer_reads_the_teacher(point: str, ready: tuple[Tiny, GraphModule]) -> None:
    tiny, base = ready
    gm = ti_fx.fork(base)
    layers = {(site.stack, site.layer) for site in ti_fx.find_attention(gm)}
    found = places(gm, point)
    assert [(one.stack, one.layer) for one in found] == sorted(layers)
    teacher = {node: twin.name for node, twin in roles.twin_of(gm.graph).items()}
    before = run_recorded(gm, tiny.example)
    wanted = {one.tap.name: teacher[one.tap] for one in found if one.tap is not None}
    assert len(wanted) == len(layers)
    Pipeline(Intervene(point))(gm)
    after = run_recorded(gm, tiny.example)
    for tap, twin in wanted.items():
        node = next(node for node in gm.graph.nodes if node.name == tap)
        assert not [user.name for user in node.users if roles.is_student(user) and user.op != "output"]
        assert [user for user in node.users if roles.role(user) == "loss"] or point == "ffn"
        assert torch.equal(after[twin], before[twin])
    assert not any("detach" in line for line in ti_fx.dump(gm).splitlines())


def test_layers_compute_what_the_teacher_would_read(ready: tuple[Tiny, GraphModule]) -> None:
    """Each layer's output is the student's layer on the teacher's stream: another layer's weights don't matter."""
    tiny, base = ready
    gm = ti_fx.fork(base)
    Pipeline(Intervene("layer"))(gm)
    outputs = [one.tap for one in places(gm, "layer")]
    losses = [node for node in gm.graph.nodes if node.name.startswith("loss_layer_outputs_")]
    gm.train(False)
    reached: set[str] = set()
    for loss in losses:
        gm.zero_grad(set_to_none=True)
        run_recorded(gm, tiny.example)[loss.name].backward()
        trained = {name for name, value in gm.named_parameters() if value.grad is not None}
        assert trained
        assert not trained & reached or tiny.name in ("gpt2", "t5")  # tied embeddings; the encoder's output
        reached |= trained
    assert len(losses) > len(outputs)


@pytest.mark.parametrize(
    "narrow", [{"layers": (1,)}, {"kind": "self"}, {"kind": "cross"}, {"stack": 1}], ids=str
)
@pytest.mark.parametrize("point", ["layer", "ffn"])
def test_layers_are_selected_by_stack_layer_and_kind(point: str, narrow: dict[str, object], t5: Tiny) -> None:
    gm = prepared(t5)
    Pipeline(Intervene(point, **narrow))(gm)  # type: ignore[arg-type]
    expected = {"layers": {(0, 1), (1, 1)}, "stack": {(1, 0), (1, 1)}}
    every = {(0, 0), (0, 1), (1, 0), (1, 1)}
    wanted = {(1, 0), (1, 1)} if narrow.get("kind") == "cross" else expected.get(next(iter(narrow)), every)
    taps = [roles.fact(node, "place") for node in gm.graph.nodes if roles.fact(node, "intervened") == point]
    assert {(stack, layer) for stack, layer, _ in taps} == wanted


def test_the_laws_of_interventions(ready: tuple[Tiny, GraphModule]) -> None:
    """Run twice, nothing changes; the second replaces the first; none restores the prepared graph."""
    tiny, base = ready
    chosen = PASSES if tiny.name == "bert" else PASSES[:3]
    alone = {one: run(base, one) for one in chosen}
    assert alone[Intervene()] == ti_fx.dump(base)
    assert len(set(alone.values())) == len(chosen)
    for first, second in itertools.product(chosen, repeat=2):
        assert run(base, first, second) == alone[second], f"{second} after {first}"


def test_layers_one_after_the_other_are_all_layers(ready: tuple[Tiny, GraphModule]) -> None:
    _, base = ready
    cases: tuple[dict[str, Any], ...] = ({"at": "layer", "blend": True}, {"at": "ffn"})
    for options in cases:
        everywhere = Intervene(**options)
        one_by_one = run(base, Intervene(layers=(1,), **options), Intervene(layers=(0,), **options))
        assert one_by_one == run(base, everywhere)
        assert run(base, everywhere, Intervene(layers=(0,)), Intervene(layers=(1,))) == ti_fx.dump(base)


def test_blends_commute_with_weights_and_losses_and_refuse_activations(bert: Tiny) -> None:
    start = bert.fork()
    Pipeline(DecomposeAttention(), DuplicateTeacher())(start)
    blended = Intervene("map+layer", blend=True)
    orders = {run(start, *order) for order in itertools.permutations((Ternarize(), Distill(), blended))}
    assert len(orders) == 1
    with pytest.raises(PreconditionError, match=r"run it before intervene\{blend\}"):
        run(start, Ternarize(), blended, QuantizeActivations())


def test_another_teacher_goes_under_a_blend(prepared_bert: GraphModule, bert: Tiny) -> None:
    blended = Intervene("layer", blend=True)
    assert run(prepared_bert, blended, DuplicateTeacher(teacher=bert.model)) == run(prepared_bert, blended)


@pytest.mark.parametrize("blend", [False, True, "rows"])
def test_strip_leaves_nothing_of_an_intervention(blend: bool, prepared_bert: GraphModule, bert: Tiny) -> None:
    alone, gm = ti_fx.fork(prepared_bert), ti_fx.fork(prepared_bert)
    Pipeline(Strip(), Pack())(alone)
    Pipeline(Intervene("output+layer+ffn", blend=blend), Strip(), Pack())(gm)
    assert ti_fx.dump(gm) == ti_fx.dump(alone)
    assert dict(gm.named_buffers()).keys() == dict(alone.named_buffers()).keys()
    assert [name for name, _ in gm.named_modules()] == [name for name, _ in alone.named_modules()]


def test_shares_are_buffers_and_no_state(prepared_bert: GraphModule) -> None:
    gm = ti_fx.fork(prepared_bert)
    state, modules = list(gm.state_dict()), [name for name, _ in gm.named_modules()]
    Pipeline(Intervene("layer", blend="rows"))(gm)
    names = [f"blend.{one.tap}" for one in shares(gm)]
    assert len(names) == 2
    assert set(names) <= dict(gm.named_buffers()).keys()
    assert not set(names) & dict(gm.named_parameters()).keys()
    assert list(gm.state_dict()) == state
    Pipeline(Intervene())(gm)
    assert not set(names) & dict(gm.named_buffers()).keys()
    assert [name for name, _ in gm.named_modules()] == modules


def test_a_share_stays_where_a_blend_stays_and_a_fork_keeps_its_own(prepared_bert: GraphModule) -> None:
    gm = ti_fx.fork(prepared_bert)
    Pipeline(Intervene("layer", blend=True))(gm)
    set_shares(gm, {one.tap: 0.25 for one in shares(gm)})
    Pipeline(Intervene("layer+ffn", blend=True))(gm)
    assert {one.point: float(one.value) for one in shares(gm)} == {"layer": 0.25, "ffn": 1.0}
    fork = ti_fx.fork(gm)
    Pipeline(Intervene("map", blend=True))(fork)
    assert {one.point for one in shares(gm)} == {"layer", "ffn"}
    assert {one.point for one in shares(fork)} == {"map"}
    gm.train(False)(**text_example())
    fork(**text_example())


@pytest.mark.slow
def test_hidden_states_keep_the_tap() -> None:
    model = bert_model(output_hidden_states=True)
    gm = ti_fx.capture(model, text_example())
    Pipeline(DuplicateTeacher(), Ternarize(), Intervene("layer", blend=True))(gm)
    outputs = gm.train(False)(**text_example())
    taps = [one.tap for one in shares(gm)]
    values = run_recorded(gm, text_example())
    # the second layer's input is the first one's output: the student's own, as it was returned before
    assert any(torch.equal(outputs.hidden_states[1], values[tap]) for tap in taps)


def test_a_value_of_ones_own(prepared_bert: GraphModule, bert: Tiny) -> None:
    base = ti_fx.dump(prepared_bert)
    gm = ti_fx.fork(prepared_bert)
    tap = next(node for node in gm.graph.nodes if node.name == "gelu")
    before = run_recorded(gm, bert.example)
    Pipeline(Intervene("node:gelu"))(gm)
    after = run_recorded(gm, bert.example)
    assert torch.equal(after["gelu"], before["gelu"])
    assert [user for user in tap.users if roles.is_student(user)] == []
    alone = ti_fx.dump(gm)
    assert run(gm, Intervene("node:gelu")) == alone
    assert run(prepared_bert, Intervene("layer"), Intervene("node:gelu")) == alone
    assert run(gm, Intervene("node:gelu+layer", blend=True), Intervene()) == base
    assert run(gm, Intervene(layers=(0,))) == alone  # belongs to no layer


@pytest.mark.parametrize(
    ("one", "error", "says"),
    [
        (Intervene("node:gelo"), SelectionError, "no node is called 'gelo'; did you mean 'gelu'"),
        (Intervene("node:query_weight"), PreconditionError, "no value that the student computes (student get_attr)"),
        (Intervene("node:loss"), PreconditionError, "no value that the student computes (loss"),
        (Intervene("node:query_weight_q"), PreconditionError, "the teacher has no value for %query_weight_q"),
        (Intervene("node:gelu", layers=(0,)), SelectionError, "node:gelu is one value; leave them out"),
        (Intervene("layer", layers=(7,)), SelectionError, "selects none of the graph's 2 layers"),
        (Intervene("ffn", stack=3), SelectionError, "selects none of the graph's 2 feed-forward blocks"),
        (Intervene("layer", layers=(0, 7)), SelectionError, "no selected block has layer 7"),
        (Intervene(blend=True), SelectionError, "needs a point to blend at"),
        (Intervene("layr", blend=True), SelectionError, "can't act at 'layr'; did you mean 'layer'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_intervened_is_refused(
    one: Pass, error: type[Exception], says: str, prepared_bert: GraphModule
) -> None:
    with pytest.raises(error) as caught:
        run(prepared_bert, one)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_are_refused_where_there_are_none(gpt2: Tiny) -> None:
    """GPT-2's output projection computes (rows · tokens, features)."""
    with pytest.raises(
        PreconditionError, match="has no dimension of rows, so none can be drawn; give blend=tokens"
    ):
        run(prepared(gpt2), Intervene("output", blend="rows"))


class InPlace(nn.Module):
    """A layer that adds to its stream in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        scores = self.q(y) @ self.k(y).transpose(1, 2)
        x += self.o(scores.softmax(-1) @ self.v(y))
        return x


@pytest.mark.parametrize("blend", [False, True])
def test_a_student_that_writes_into_its_stream_leaves_the_teachers_alone(blend: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), InPlace(), InPlace(), nn.Linear(8, 3))
    example = {"input": torch.randn(2, 4, 5)}
    gm = ti_fx.capture(model, example)
    Pipeline(DuplicateTeacher())(gm)
    with torch.no_grad():
        for name, value in gm.named_parameters():
            if name.startswith("teacher."):
                value.mul_(1.5)
    last = next(node for node in reversed(gm.graph.nodes) if roles.is_teacher(node)).name
    before = run_recorded(gm, example)[last].clone()
    Pipeline(Intervene("layer", blend=blend))(gm)
    assert torch.equal(run_recorded(gm, example)[last], before)


def test_every_point_of_the_table_is_described() -> None:
    assert list(POINTS) == ["map", "context", "output", "layer", "ffn"]
    assert {name: point.detached for name, point in POINTS.items() if not point.detached} == {
        "layer": (),
        "ffn": (),
    }
