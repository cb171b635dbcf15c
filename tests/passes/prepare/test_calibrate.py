"""Calibration: outputs come nearer to the teacher's, the graph stays as it is, and what can't be used is refused."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import pytest
import torch
from models import VOCABULARY, Tiny, prepared, seeded
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx import numerics
from ti_fx.analysis import divergence
from ti_fx.errors import DataError, InputError, PreconditionError, RecipeError
from ti_fx.ir import roles
from ti_fx.ir.edit import tensor
from ti_fx.ir.outputs import model_outputs, named_leaves
from ti_fx.ir.pipeline import Pass, Pipeline
from ti_fx.ir.run_by_need import RunByNeed
from ti_fx.passes import (
    Calibrate,
    DecomposeAttention,
    DuplicateTeacher,
    Intervene,
    QuantizeActivations,
    Strip,
    Ternarize,
)

Made = TypeVar("Made", bound=nn.Module)
NAMES = ("bert", "gpt2", pytest.param("t5", marks=pytest.mark.slow), "vit")


def rows_like(example: dict[str, Tensor], count: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows of random inputs of the example's kinds; every third row is padded."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, value in example.items():
        shape = (count, *value.shape[1:])
        if value.is_floating_point():
            made[name] = torch.randn(shape, generator=generator)
        elif "mask" in name:
            made[name] = torch.ones(shape, dtype=value.dtype)
            made[name][::3, -2:] = 0
        else:
            made[name] = torch.randint(1, VOCABULARY, shape, generator=generator)
    return made


def with_attention(model: Made) -> Made:
    """Draw weights so large that every layer matters."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                spread = parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def ready(gm: GraphModule, **options: Any) -> GraphModule:
    """Return a graph with teacher, ternary weights and quantised activations, over tensors of its own."""
    own = copy.deepcopy(gm)
    Pipeline(DecomposeAttention(), DuplicateTeacher(), Ternarize(**options), QuantizeActivations())(own)
    return own.eval()


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> tuple[GraphModule, dict[str, Tensor]]:
    tiny: Tiny = request.getfixturevalue(request.param)
    gm = copy.deepcopy(tiny.graph)
    with_attention(gm)
    return gm, tiny.example


@pytest.mark.parametrize("options", [{"embeddings": None}, {"embeddings": None, "weights": "row"}])
def test_outputs_come_nearer_to_the_teacher_on_rows_it_has_not_seen(
    case: tuple[GraphModule, dict[str, Tensor]], options: dict[str, Any]
) -> None:
    gm, example = ready(case[0], **options), case[1]
    held_out = rows_like(example, 64, seed=1)
    text, before = ti_fx.dump(gm), divergence(gm, held_out)
    weights = {
        str(node.all_input_nodes[0].target)
        for node in gm.graph.find_nodes(op="call_function", target=numerics.ternary)
    }
    one = Calibrate(rows=160, data=rows_like(example, 192))  # five batches
    Pipeline(one)(gm)
    after = divergence(gm, held_out)
    assert after.value < 0.85 * before.value
    assert ti_fx.dump(gm) == text
    assert {row.name for row in one.report} == weights
    for row in one.report:
        assert row.after <= row.before
        assert bool(row.rows) != bool(row.note)


def test_a_value_is_what_the_graph_computes(case: tuple[GraphModule, dict[str, Tensor]]) -> None:
    gm, batch = ready(case[0]), rows_like(case[1], 4)
    wanted = list(named_leaves(model_outputs(gm)).values())
    middle = [node for node in gm.graph.nodes if roles.is_teacher(node) and node.op == "call_function"][::7]
    run = RunByNeed(gm, [batch, batch], [*middle, *wanted])
    found: list[dict[Any, Tensor]] = []
    run.visit(wanted, lambda values: found.append(dict(values)), ahead=True)
    for node in middle:
        run.visit([node], lambda values: None)
    run.visit(wanted, lambda values: found.append(dict(values)))
    student = ti_fx.fork(gm)
    Pipeline(Strip(keep_tensors=True))(student)
    expected = student(**batch)
    leaves = [
        value
        for value in (expected.values() if hasattr(expected, "values") else expected)
        if value is not None
    ]
    assert len(found) == 4
    for values in found:
        assert torch.equal(values[wanted[0]], leaves[0])


def test_padding_does_not_count(bert: Tiny) -> None:
    gm = copy.deepcopy(bert.graph)
    batch = rows_like(bert.example, 32)
    other = dict(batch, input_ids=torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"]))
    made = []
    for data in (batch, other):
        own, one = ready(gm, embeddings=None), Calibrate(data=data)
        Pipeline(QuantizeActivations("int8-token"), one)(own)
        made.append((own.state_dict(), one.report[0].rows))
    assert made[0][1] == made[1][1] == int(batch["attention_mask"].sum())
    assert all(torch.equal(made[0][0][name], made[1][0][name]) for name in made[0][0])


def test_a_second_run_changes_nothing_and_latents_in_their_cells_have_the_same_codes(bert: Tiny) -> None:
    data = rows_like(bert.example, 32)
    grid = ready(bert.graph)
    cell = copy.deepcopy(grid)
    Pipeline(Calibrate(data=data))(grid)
    once = {name: value.clone() for name, value in grid.state_dict().items()}
    Pipeline(Calibrate(data=data))(grid)
    for name, value in grid.state_dict().items():
        torch.testing.assert_close(value, once[name], rtol=1e-5, atol=1e-6)
    Pipeline(Calibrate(data=data, latents="cell"))(cell)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    left, right = tensor(grid, name), tensor(cell, name)
    assert torch.equal(numerics.ternary_codes(left)[0], numerics.ternary_codes(right)[0])
    torch.testing.assert_close(numerics.ternary(left), numerics.ternary(right))
    assert len(torch.unique(left)) <= 3 < len(torch.unique(right))


class OneWeightTwice(nn.Module):
    """A layer that is applied twice, and one that no row reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.relu(self.layer(x))
        none = self.unused(x[:, :0])
        logits: Tensor = self.head(x + none.sum(1, keepdim=True))
        return logits


def test_a_weight_that_is_read_twice_and_one_that_no_row_reaches() -> None:
    gm = ti_fx.capture(with_attention(seeded(OneWeightTwice)), {"x": torch.randn(4, 5, 8)})
    own = ready(gm)
    one = Calibrate(data={"x": torch.randn(64, 5, 8)})
    Pipeline(one)(own)
    layer, unused = one.report
    assert (layer.name, layer.rows) == ("layer.weight", 2 * 64 * 5)
    assert layer.after < layer.before
    assert (unused.name, unused.note) == ("unused.weight", "no row reaches it")
    assert "as rounded, no row reaches it" in one.explain(own)


@pytest.mark.slow
def test_tuning_scales_biases_and_norms_changes_no_code(bert: Tiny) -> None:
    gm = ready(with_attention(copy.deepcopy(bert.graph)), embeddings=None)
    tuned, data = copy.deepcopy(gm), rows_like(bert.example, 40)
    Pipeline(Calibrate(data=data, batch_size=8))(gm)
    one = Calibrate(data=data, batch_size=8, steps=24)
    Pipeline(one)(tuned)
    row = one.report[-1]
    assert row.name == "scales, biases and norms"
    assert row.after < row.before
    for node in gm.graph.find_nodes(op="call_function", target=numerics.ternary):
        name = str(node.all_input_nodes[0].target)
        left, right = (numerics.ternary_codes(tensor(graph, name)) for graph in (gm, tuned))
        assert torch.equal(left[0], right[0])
        assert not torch.equal(left[1], right[1])
    assert all(parameter.grad is None for parameter in tuned.parameters())


def test_few_rows_are_used_and_said(bert: Tiny) -> None:
    own, one = ready(bert.graph), Calibrate(rows=2, data=[rows_like(bert.example, 3)])
    Pipeline(one)(own)
    wide = next(row for row in one.report if row.name.endswith("layer.1.output.dense.weight"))
    assert (wide.rows, wide.note) == (12, "fewer rows than its 32 inputs")  # one of two rows is padded by 2


def test_a_weight_whose_scale_is_beyond_the_clip_is_left_and_said(bert: Tiny) -> None:
    own = ready(bert.graph, clip=1e-3)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    one = Calibrate(rows=8, data=[rows_like(bert.example, 8)])
    Pipeline(one)(own)
    assert one.report
    assert all("beyond clip=0.001" in str(row) for row in one.report if row.inputs)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


def test_what_it_can_not_use_is_refused(bert: Tiny, vit: Tiny) -> None:
    gm, example = ready(bert.graph), bert.example
    for data, kind, words in (
        (None, PreconditionError, "has no rows"),
        ([], DataError, "0 rows"),
        ([{"input_ids": example["input_ids"]}], InputError, "batch 0"),
        ([example, [1]], InputError, "batch 1"),
        ({**example, "input_ids": example["input_ids"].float()}, InputError, "batch 0"),
    ):
        with pytest.raises(kind, match=words):
            Pipeline(Calibrate(data=data))(gm)  # type: ignore[arg-type]
    alone, full = ti_fx.fork(bert.graph), ti_fx.fork(bert.graph)
    Pipeline(Ternarize())(alone)
    Pipeline(DuplicateTeacher())(full)
    for graph, missing in ((alone, "duplicate-teacher"), (full, "ternarize")):
        with pytest.raises(PreconditionError, match=f"run {missing} first"):
            Pipeline(Calibrate(data=example))(graph)
    intervened = prepared(bert)
    Pipeline(Intervene("map"))(intervened)
    with pytest.raises(PreconditionError, match="without an intervention"):
        Pipeline(Calibrate(data=example))(intervened)
    images = ready(vit.graph)
    broken = torch.randn(4, 3, 8, 8)
    broken[2] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        Pipeline(Calibrate(data={"pixel_values": broken}))(images)


def test_a_value_that_is_no_number_is_refused_and_nothing_is_changed(vit: Tiny) -> None:
    gm = ready(vit.graph)
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    with pytest.raises(DataError, match="no number"):
        Pipeline(Calibrate(data={"pixel_values": torch.full((4, 3, 8, 8), 3e38)}))(gm)
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())


def test_its_text_parses_back() -> None:
    one = Calibrate(rows=64, damping=0.2, latents="cell", data=[])
    assert str(one) == "calibrate{rows=64 damping=0.2 latents=cell}"
    assert Pass.parse(str(one)) == one
    with pytest.raises(RecipeError):
        Pass.parse("calibrate{latents=near}")
