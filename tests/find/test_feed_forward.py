"""Feed-forward blocks are found where they are: by numbers against the models' own modules, and under any renaming."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from models import t5_model
from slow import slow
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import ti_fx
from ti_fx.find.walk import projection_weight
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
from ti_fx.zoo import build

pytestmark = pytest.mark.seconds


@dataclass(frozen=True)
class Case:
    """What a model's feed-forward blocks are.

    Attributes:
        modules: the modules whose output is that of one block's last projection, in order.
        places: stack and layer of each block.
        up, gate, down: the weights of the first block.
    """

    modules: tuple[str, ...]
    places: tuple[tuple[int, int], ...]
    up: str
    gate: str | None
    down: str


TWO = ((0, 0), (0, 1))
T5 = tuple(
    f"{stack}.block.{layer}.layer.{last}.DenseReluDense"
    for stack, last in (("encoder", 1), ("decoder", 2))
    for layer in (0, 1)
)


def gated(model: str = "model.layers") -> Case:
    modules = tuple(f"{model}.{layer}.mlp" for layer in (0, 1))
    up, gate, down = (f"{modules[0]}.{part}_proj.weight" for part in ("up", "gate", "down"))
    return Case(modules, TWO, up, gate, down)


def plain(first: str, up: str, down: str, module: str | None = None) -> Case:
    """``{}`` stands for the layer; the result is the last projection's unless a module is named."""
    modules = tuple((module or f"{first}.{down}").format(layer) for layer in (0, 1))
    start = first.format(0)
    return Case(modules, TWO, f"{start}.{up}.weight", None, f"{start}.{down}.weight")


CASES = {
    "bert": plain("bert.encoder.layer.{}", "intermediate.dense", "output.dense"),
    "gpt2": plain("transformer.h.{}.mlp", "c_fc", "c_proj", "transformer.h.{}.mlp"),
    "vit": plain("vit.layers.{}.mlp", "fc1", "fc2", "vit.layers.{}.mlp"),
    "llama": gated(),
    "phi3": Case(
        ("model.layers.0.mlp", "model.layers.1.mlp"),
        TWO,
        "model.layers.0.mlp.gate_up_proj.weight",
        "model.layers.0.mlp.gate_up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ),
    # parallel blocks: attention and feed-forward are added first; the input and attention are added first
    "gpt_neox": plain("gpt_neox.layers.{}.mlp", "dense_h_to_4h", "dense_4h_to_h", "gpt_neox.layers.{}.mlp"),
    "cohere": gated(),
    "gemma2": gated(),  # norms around each block
    "t5": Case(
        T5,
        ((0, 0), (0, 1), (1, 0), (1, 1)),
        f"{T5[0]}.wi.weight",
        None,
        f"{T5[0]}.wo.weight",
    ),
    "t5_gated": Case(
        T5,
        ((0, 0), (0, 1), (1, 0), (1, 1)),
        f"{T5[0]}.wi_1.weight",
        f"{T5[0]}.wi_0.weight",
        f"{T5[0]}.wo.weight",
    ),
    # experts: batched weights, and a shared expert of its own; the router is none
    "mixtral": Case(("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"), TWO, "", "", ""),
}


@cache
def captured(name: str) -> tuple[nn.Module, dict[str, Tensor], GraphModule]:
    if name == "t5_gated":
        model: nn.Module = t5_model(feed_forward_proj="gated-gelu").eval()  # type: ignore[no-untyped-call]
        ids = torch.arange(24).reshape(2, 12)
        example = {"input_ids": ids, "decoder_input_ids": ids[:, :7]}
    else:
        entry = build(name)
        model, example = entry.model, entry.example
    gm = ti_fx.capture(model, example)
    return model, example, gm.eval()


def weight_name(node: Node | None) -> str | None:
    if node is None:
        return None
    weight = projection_weight(node)
    return "" if weight is None else str(weight.target)


# One plain, one gated, one fused, one parallel, one with experts; the others are captured by `make test-full`.
QUICK = ("bert",)
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", EACH)
def test_each_layer_has_its_own(name: str) -> None:
    case = CASES[name]
    sites = ti_fx.find_feed_forward(captured(name)[2])
    assert tuple((site.stack, site.layer) for site in sites) == case.places
    first = sites[0]
    found = (weight_name(first.up), weight_name(first.gate), weight_name(first.down))
    assert found == (case.up, case.gate, case.down)
    for site in sites:
        assert site.residual is not None
        assert site.hidden in site.down.all_input_nodes


class Without(torch.fx.Interpreter):
    """Runs a graph with some nodes' results replaced by zeros."""

    def __init__(self, gm: GraphModule, nodes: set[Node]) -> None:
        super().__init__(gm)
        self.nodes = nodes

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        return torch.zeros_like(value) if n in self.nodes else value


def outputs(result: Any) -> Tensor:
    value: Tensor = result["logits"] if "logits" in result else result[0]
    return value


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("chosen", [[0], [1]], ids=str)
def test_without_its_result_the_graph_is_the_model_without_the_module(name: str, chosen: list[int]) -> None:
    model, example, gm = captured(name)
    sites = ti_fx.find_feed_forward(gm)
    with torch.no_grad():
        found = outputs(Without(gm, {sites[index].down for index in chosen}).run(*example.values()))
        plainly = outputs(gm(**example))
        hooks = [
            model.get_submodule(CASES[name].modules[index]).register_forward_hook(
                lambda module, inputs, output: torch.zeros_like(output)
            )
            for index in chosen
        ]
        expected = outputs(model(**example))
        for one in hooks:
            one.remove()
    # the same operations in the same order: what differs is rounding in the few that capture wrote otherwise
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert (found - plainly).norm() >= 1e-4 * plainly.norm()


PREPARE = (DecomposeAttention(), DuplicateTeacher(), Ternarize(), QuantizeActivations(), Distill())


@pytest.mark.parametrize("name", ["bert", *slow("llama", "t5")])
def test_passes_move_no_site(name: str) -> None:
    gm = ti_fx.fork(captured(name)[2])

    def places() -> list[tuple[Any, ...]]:
        return [
            (site.stack, site.layer, *map(weight_name, (site.up, site.gate, site.down)), site.hidden.name)
            for site in ti_fx.find_feed_forward(gm)
        ]

    before = places()
    for one in (*PREPARE, Intervene("map"), Intervene("output"), Intervene(), Strip()):
        ti_fx.Pipeline(one)(gm)
        assert places() == before, one
        for site in ti_fx.find_feed_forward(gm):
            assert all(ti_fx.ir.roles.is_student(node) for node in (site.up, site.down, site.hidden))
    ti_fx.Pipeline(Pack())(gm)
    assert [place[:2] for place in places()] == [place[:2] for place in before]


@pytest.mark.parametrize(
    "name",
    ["bert", *slow("llama", "phi3", "gpt2", "t5")],
)
def test_names_say_nothing(name: str) -> None:
    gm = captured(name)[2]
    renamed = copy.deepcopy(gm)
    order = list(range(len(renamed.graph.nodes)))
    random.Random(0).shuffle(order)
    for node, number in zip(renamed.graph.nodes, order, strict=True):
        node.meta.pop("nn_module_stack", None)
        if node.op not in ("placeholder", "output"):
            node._rename(f"n{number}")
    position = {node: index for index, node in enumerate(gm.graph.nodes)}
    renamed_position = {node: index for index, node in enumerate(renamed.graph.nodes)}

    def numbers(found: GraphModule, where: dict[Node, int]) -> list[list[Any]]:
        return [
            [where[part] if isinstance(part, Node) else part for part in vars(site).values()]
            for site in ti_fx.find_feed_forward(found)
        ]

    assert numbers(renamed, renamed_position) == numbers(gm, position)


class Block(nn.Module):
    """A linear, something in between, a linear; with or without a residual add."""

    def __init__(self, between: nn.Module, residual: bool) -> None:
        super().__init__()
        self.first, self.between, self.second = nn.Linear(8, 16), between, nn.Linear(16, 8)
        self.residual = residual
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = self.second(self.between(self.first(x)))
        result: Tensor = self.last(x + found if self.residual else found)
        return result


class SquaredReLU(nn.Module):
    """As Primer has it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


class WrittenOut(nn.Module):
    """GELU's approximation, written out: its sum of a value and its cube is no residual add."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


ACTIVATIONS = (
    *(nn.GELU(), nn.ReLU(), nn.SiLU(), nn.Sigmoid(), nn.Tanh(), nn.Mish(), nn.Hardswish(), nn.LeakyReLU()),
    *(nn.PReLU(), nn.Softplus(), nn.ELU(), nn.ReLU6(), SquaredReLU(), WrittenOut()),
    nn.Sequential(nn.Dropout(0.1), nn.GELU(), nn.LayerNorm(16)),
)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda one: type(one).__name__)
def test_any_activation_function_will_do(activation: nn.Module) -> None:
    gm = ti_fx.capture(Block(activation, residual=True).eval(), (torch.randn(3, 8),))
    (site,) = ti_fx.find_feed_forward(gm)
    assert (weight_name(site.up), site.gate, weight_name(site.down)) == (
        "first.weight",
        None,
        "second.weight",
    )
    assert (site.stack, site.layer) == (-1, -1)


@pytest.mark.parametrize(
    ("between", "residual"),
    [(nn.GELU(), False), (nn.Identity(), True), (nn.LayerNorm(16), True), (nn.RMSNorm(16), True)],
    ids=["head", "linear", "layer norm", "rms norm"],
)
def test_without_residual_add_or_activation_it_is_none(between: nn.Module, residual: bool) -> None:
    gm = ti_fx.capture(Block(between, residual).eval(), (torch.randn(3, 8),))
    assert ti_fx.find_feed_forward(gm) == []


def test_a_site_says_where_and_what_it_is() -> None:
    site = ti_fx.find_feed_forward(captured("llama")[2])[1]
    assert site.where == "stack 0, layer 1"
    assert str(site).startswith(f"stack 0, layer 1: up=%{site.up.name} gate=%")
