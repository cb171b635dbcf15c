"""Every plain-PyTorch transformer goes through the whole chain, and its sites are the blocks counted by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree
from zoo_plain import BLOCKS, FACTORIES

import ti_fx
from ti_fx.errors import PreconditionError
from ti_fx.export import to_onnx
from ti_fx.ir.edit import aten_name, tensor
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

POINTS = ("map", "context", "output")
# One of each kind; the slow tests export and train the rest.
EXPORTED: tuple[str, ...] = ()
TRAINED = (*("rotary", "fused_split", "lora", "perceiver", "experts", "without_output"),)
CAPTURED = (*TRAINED, "torch_encoder_fast_path", "linear_attention")


def each(chosen: Iterable[str]) -> pytest.MarkDecorator:
    """Run a test on every captured factory; those that are not chosen are slow."""
    names = [pytest.param(name, marks=() if name in chosen else pytest.mark.slow) for name in FACTORIES]
    return pytest.mark.parametrize("captured", names, indirect=True)


@dataclass(frozen=True)
class Captured:
    """A factory's model, its two examples, and its graph, which tests fork."""

    name: str
    model: nn.Module
    example: dict[str, Tensor]
    other: dict[str, Tensor]
    graph: GraphModule


@pytest.fixture(scope="module")
def captured(request: pytest.FixtureRequest) -> Captured:
    made = FACTORIES[request.param]()
    return Captured(request.param, *made, ti_fx.capture(*made[:2]))


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


class Uniform(Interpreter):
    """Runs a graph with one map replaced by a uniform one over what it attends to."""

    def __init__(self, gm: GraphModule, map_: Node) -> None:
        super().__init__(gm)
        self.map = map_

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n is not self.map:
            return value
        read = (value > 0).to(value.dtype)
        return read / read.sum(int(str(n.args[1])), keepdim=True).clamp(min=1)


def effect(gm: GraphModule, map_: Node, example: dict[str, Tensor]) -> float:
    """Return how far a uniform map moves the outputs, relative to their norm."""
    with torch.no_grad():
        expected = tensors(gm(**example))
        moved = tensors(Uniform(gm, map_).run(*example.values()))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(moved, expected, strict=True))


@each(CAPTURED)
def test_the_graph_equals_the_model_and_its_sites_are_its_blocks(captured: Captured) -> None:
    name, model, example, other = captured.name, captured.model, captured.example, captured.other
    gm = ti_fx.fork(captured.graph)
    ti_fx.Pipeline(DecomposeAttention())(gm)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it computes zeros at padding
    try:
        for inputs in (example, other):
            for expected, actual in zip(tensors(model(**inputs)), tensors(gm(**inputs)), strict=True):
                # sums in another order, relative to the largest entry
                assert (expected - actual).abs().max() <= 1e-5 * expected.abs().max()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    sites = ti_fx.find_attention(gm)
    assert len(sites) == BLOCKS[name]
    for site in sites:
        assert site.map is not None
        assert aten_name(site.map) == "softmax"
        assert effect(gm, site.map, example) >= 0.01, site


@each(TRAINED)
def test_every_pass_runs_and_every_gradient_is_finite(captured: Captured) -> None:
    name, example = captured.name, captured.example
    gm = ti_fx.fork(captured.graph)
    sites = bool(BLOCKS[name])
    losses = Distill() if sites else Distill(layer_outputs=0, scores=0, attention_outputs=0)
    prepare = ti_fx.Pipeline(
        DecomposeAttention(), DuplicateTeacher(), Ternarize(), QuantizeActivations(), losses
    )
    prepare(gm)
    plain = ti_fx.dump(gm)
    for point in POINTS if sites else ():
        if name == "without_output" and point == "output":
            with pytest.raises(PreconditionError, match="has no output"):
                ti_fx.Pipeline(Intervene(at=point))(gm)
            continue
        ti_fx.Pipeline(Intervene(at=point))(gm)
        train(gm, example)
    if sites:
        ti_fx.Pipeline(Intervene())(gm)
        assert ti_fx.dump(gm) == plain
        quantised = ti_fx.fork(gm)
        ti_fx.Pipeline(QuantizeActivations(attention=True))(quantised)
        train(quantised, example)
    train(gm, example)
    ti_fx.Pipeline(Strip())(gm)
    with torch.no_grad():
        student = tensors(gm.eval()(**example))
        ti_fx.Pipeline(Pack())(gm)
        for expected, actual in zip(student, tensors(gm(**example)), strict=True):
            assert torch.equal(expected, actual)


def train(gm: GraphModule, example: dict[str, Tensor]) -> None:
    gm.train().zero_grad(set_to_none=True)
    loss = gm(**example)["loss"]
    assert loss.isfinite()
    loss.backward()
    gradients = [value.grad for value in gm.parameters() if value.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@each(EXPORTED)
def test_the_packed_student_is_exported_and_agrees(captured: Captured, tmp_path: Path) -> None:
    gm = ti_fx.fork(captured.graph)
    ti_fx.Pipeline(DecomposeAttention(), Ternarize(), QuantizeActivations(), Strip(), Pack())(gm)
    assert to_onnx(gm, tmp_path / "student.onnx", captured.example).parity.differences


def test_a_frozen_base_weight_stays_frozen_and_its_low_rank_update_trains() -> None:
    model, example, _ = FACTORIES["lora"]()
    gm = ti_fx.capture(model, example)
    ti_fx.Pipeline(DuplicateTeacher(), Ternarize(), QuantizeActivations(), Distill())(gm)
    train(gm, example)
    assert tensor(gm, "blocks.0.attention.q.base.weight").grad is None
    assert tensor(gm, "blocks.0.attention.q.down.weight").grad is not None
