"""Attention is found where it is: checked by numbers against the models themselves, and under any renaming."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import Tiny
from slow import slow
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from transformers import AttentionInterface
from transformers.models.bert.modeling_bert import eager_attention_forward as bert_attention
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward as gpt2_attention
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_attention

import ti_fx
from ti_fx.find.attention import AttentionSite, layer_outputs
from ti_fx.find.walk import projection_weight
from ti_fx.ir.edit import register, tensor
from ti_fx.ir.facts import facts
from ti_fx.ir.text import type_text
from ti_fx.passes import (
    DecomposeAttention,
    Distill,
    DuplicateTeacher,
    Intervene,
    QuantizeActivations,
    Ternarize,
)

# Stack, layer and kind of each block, as the configurations in models.py say.
EXPECTED = {
    "bert": [(0, 0, "self"), (0, 1, "self")],
    "gpt2": [(0, 0, "self"), (0, 1, "self")],
    "llama": [(0, 0, "self"), (0, 1, "self")],
    "vit": [(0, 0, "self"), (0, 1, "self")],
    "torch_encoder": [(0, 0, "self"), (0, 1, "self")],
    "plain": [(0, 0, "self"), (0, 1, "self")],
    "t5": [
        (0, 0, "self"),
        (0, 1, "self"),
        (1, 0, "self"),
        (1, 0, "cross"),
        (1, 1, "self"),
        (1, 1, "cross"),
    ],
}
# The parameters of the first block's query, key, value and output projections.
WEIGHTS = {
    "bert": [
        f"bert.encoder.layer.0.attention.{part}.weight"
        for part in ("self.query", "self.key", "self.value", "output.dense")
    ],
    "gpt2": [*3 * ["transformer.h.0.attn.c_attn.weight"], "transformer.h.0.attn.c_proj.weight"],
    "llama": [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"],
    "t5": [f"encoder.block.0.layer.0.SelfAttention.{part}.weight" for part in "qkvo"],
    "plain": [f"blocks.0.{part}.weight" for part in "qkvo"],
    "torch_encoder": [*3 * ["encoder.layers.0.self_attn.in_proj_weight"], "encoder.layers.0.self_attn.out_proj.weight"],
}  # fmt: skip


def test_every_block_is_found_and_numbered(tiny: Tiny) -> None:
    sites = ti_fx.find_attention(tiny.graph)
    assert [(site.stack, site.layer, site.kind) for site in sites] == EXPECTED[tiny.name]


def test_projections_are_the_models_own(tiny: Tiny) -> None:
    if tiny.name == "vit":
        pytest.skip("its parameter names change with transformers' versions; checked by numbers below")
    site = ti_fx.find_attention(tiny.graph)[0]
    weights = []
    for node in (site.query, site.key, site.value, site.output):
        assert node is not None
        weight = projection_weight(node)
        assert weight is not None
        weights.append(weight.target)
    assert weights == WEIGHTS[tiny.name]


def shape(node: Node | None) -> tuple[str, ...]:
    assert node is not None
    text = type_text(node.meta["val"], facts(node.graph.owning_module).sizes.names)  # type: ignore[arg-type]
    return tuple(text.partition("[")[2].rstrip("]").split(", "))


@pytest.mark.slow
def test_cross_attention_reads_the_encoder(t5: Tiny) -> None:
    *_, cross = ti_fx.find_attention(t5.graph)
    assert shape(cross.scores) == shape(cross.map)
    batch, heads, queries, keys = shape(cross.map)
    assert (batch, heads) == ("batch", "2")
    assert queries == "decoder_input_ids_sequence"
    assert keys == "sequence"


class Uniform(torch.fx.Interpreter):
    """Runs a graph with some nodes' values replaced by a uniform map."""

    def __init__(self, gm: GraphModule, nodes: set[Node]) -> None:
        super().__init__(gm)
        self.nodes = nodes

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        return torch.full_like(value, 1 / value.shape[-1]) if n in self.nodes else value


def uniform_graph(tiny: Tiny, chosen: list[int]) -> Any:
    gm = copy.deepcopy(tiny.graph).eval()
    sites = ti_fx.find_attention(gm)
    maps = {node for index in chosen if (node := sites[index].map) is not None}
    return Uniform(gm, maps).run(*tiny.example.values())


@contextmanager
def uniform_softmax(module: Any, chosen: list[int]) -> Iterator[None]:
    """Replace the chosen calls of ``softmax`` within eager attention by a uniform map."""
    counted = iter(range(1000))
    softmax = nn.functional.softmax

    def replaced(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = softmax(value, *args, **kwargs)
        return torch.full_like(result, 1 / result.shape[-1]) if next(counted) in chosen else result

    nn.functional.softmax = replaced  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.softmax = softmax


def attention_with(forward: Callable[..., Any], chosen: list[int]) -> Callable[..., Any]:
    """Wrap a model's attention function so that the chosen layers' maps are uniform."""

    def uniform(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layer = module.layer_idx
        with uniform_softmax(module, [0] if layer in chosen else []):
            return forward(module, *args, **kwargs)

    return uniform


ATTENTION = {"bert": bert_attention, "gpt2": gpt2_attention, "llama": llama_attention}


@pytest.mark.parametrize("chosen", [[0], [1], [0, 1]], ids=str)
@pytest.mark.parametrize("name", ATTENTION)
def test_the_map_is_the_map(name: str, chosen: list[int], request: pytest.FixtureRequest) -> None:
    tiny: Tiny = request.getfixturevalue(name)
    model: Any = copy.deepcopy(tiny.model).eval()
    AttentionInterface.register("uniform_test", attention_with(ATTENTION[name], chosen))
    model.set_attn_implementation("eager")
    plain = model(**tiny.example).logits
    model.set_attn_implementation("uniform_test")
    # a registered function is given the mask that its name gets: eager's is additive
    with uniform_mask():
        expected = model(**tiny.example).logits
    actual = uniform_graph(tiny, chosen).logits
    equal_but_for_rounding(actual, expected, plain)


def equal_but_for_rounding(actual: Tensor, expected: Tensor, plain: Tensor) -> None:
    """The uniform map changes the logits, in the graph as in the model: 1% of the change is far above rounding."""
    effect = (plain - expected).abs().max()
    assert effect > 1e-6
    assert (actual - expected).abs().max() < 0.01 * effect


@contextmanager
def uniform_mask() -> Iterator[None]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionMaskInterface.register("uniform_test", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    yield


@pytest.mark.parametrize("chosen", [[0], [1], [0, 1]], ids=str)
def test_the_map_of_an_image_model_is_the_map(vit: Tiny, chosen: list[int]) -> None:
    model: Any = copy.deepcopy(vit.model).eval()
    model.set_attn_implementation("eager")
    plain = model(**vit.example).logits
    with uniform_softmax(model, chosen):
        expected = model(**vit.example).logits
    equal_but_for_rounding(uniform_graph(vit, chosen).logits, expected, plain)


@pytest.mark.parametrize("chosen", [[0], [1], [2], [3], [4], [5]], ids=str)
def test_the_maps_of_encoder_decoder_and_cross_attention(t5: Tiny, chosen: list[int]) -> None:
    model: Any = copy.deepcopy(t5.model).eval()
    model.set_attn_implementation("eager")
    plain = model(**t5.example, use_cache=False).logits
    with uniform_softmax(model, chosen):
        expected = model(**t5.example, use_cache=False).logits
    equal_but_for_rounding(uniform_graph(t5, chosen).logits, expected, plain)


class Recorder(torch.fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, gm: GraphModule, nodes: list[Node]) -> None:
        super().__init__(gm)
        self.wanted = nodes
        self.values: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value


def recorded(gm: GraphModule, nodes: list[Node], example: dict[str, Tensor]) -> list[Tensor]:
    recorder = Recorder(gm, nodes)
    recorder.run(*example.values())
    return [recorder.values[node] for node in nodes]


@pytest.mark.parametrize("name", ["bert", *slow("gpt2", "vit", "llama")])
def test_layer_outputs_are_the_models_hidden_states(name: str, request: pytest.FixtureRequest) -> None:
    tiny: Tiny = request.getfixturevalue(name)
    gm = copy.deepcopy(tiny.graph).eval()
    nodes = layer_outputs(gm, ti_fx.find_attention(gm))
    model: Any = copy.deepcopy(tiny.model).eval()
    model.set_attn_implementation("eager")
    expected = list(model(**tiny.example, output_hidden_states=True).hidden_states)
    actual = recorded(gm, nodes, tiny.example)
    assert len(actual) == len(expected) == 3
    if name in ("gpt2", "llama"):
        # these models return their last state after the final norm, which belongs to no layer; ViT does not
        norm = model.transformer.ln_f if name == "gpt2" else model.model.norm
        actual[-1] = norm(actual[-1])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_layer_outputs_of_two_towers(t5: Tiny) -> None:
    gm = copy.deepcopy(t5.graph).eval()
    nodes = layer_outputs(gm, ti_fx.find_attention(gm))
    model: Any = copy.deepcopy(t5.model).eval()
    result = model(**t5.example, output_hidden_states=True, use_cache=False)
    expected = [*result.encoder_hidden_states[:2], *result.decoder_hidden_states[:2]]
    values = recorded(gm, nodes, t5.example)
    assert len(values) == 6
    for one, other in zip([*values[:2], *values[3:5]], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_prepared_graph_has_the_same_sites(tiny: Tiny) -> None:
    gm = tiny.fork()
    ti_fx.Pipeline(DecomposeAttention())(gm)
    expected = [str(site) for site in ti_fx.find_attention(gm)]
    layers = [node.name for node in layer_outputs(gm, ti_fx.find_attention(gm))]
    passes = (
        DuplicateTeacher(),
        Ternarize(),
        QuantizeActivations(attention=True),
        Distill(),
        Intervene("context"),
    )
    for one in passes:
        ti_fx.Pipeline(one)(gm)
        assert [str(site) for site in ti_fx.find_attention(gm)] == expected
        assert [node.name for node in layer_outputs(gm, ti_fx.find_attention(gm))] == layers


def test_decomposed_attention_is_the_fused_one(plain: Tiny) -> None:
    fused = [site.where for site in ti_fx.find_attention(plain.graph)]
    assert all(site.map is None for site in ti_fx.find_attention(plain.graph))
    gm = plain.fork()
    ti_fx.Pipeline(DecomposeAttention())(gm)
    sites = ti_fx.find_attention(gm)
    assert [site.where for site in sites] == fused
    assert all(site.map is not None and site.scores is not None for site in sites)
    expected = plain.graph.eval()(**plain.example)
    torch.testing.assert_close(gm.eval()(**plain.example), expected, rtol=0, atol=1e-6)
    everything_masked = {**plain.example, "keep": torch.zeros(3, 7, dtype=torch.int64)}
    assert gm(**everything_masked).isfinite().all()


@pytest.mark.parametrize(
    ("causal", "gqa", "scale"), [(True, False, None), (False, True, 0.3), (True, True, None)]
)
def test_decomposed_attention_of_each_kind(causal: bool, gqa: bool, scale: float | None) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (
                nn.Linear(8, 16),
                nn.Linear(8, 8 if gqa else 16),
                nn.Linear(8, 8 if gqa else 16),
            )
            self.o = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
            context = nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=gqa, scale=scale
            )
            result: Tensor = x + self.o(context.transpose(1, 2).flatten(2))
            return result

    torch.manual_seed(0)
    model = Attention()
    x = torch.randn(2, 5, 8)
    gm = ti_fx.capture(model, {"x": x})
    ti_fx.Pipeline(
        DecomposeAttention(),
        DuplicateTeacher(),
        Ternarize(),
        Distill(logits=0),
        Intervene("map"),
        Intervene(),
    )(gm)
    (site,) = ti_fx.find_attention(gm)
    assert (site.kind, site.layer) == ("self", 0)
    for length in (5, 3, 1):
        fresh = torch.randn(2, length, 8)
        torch.testing.assert_close(ti_fx.fork(gm)(x=fresh)["outputs"].shape, model(fresh).shape)
    plain = ti_fx.capture(model, {"x": x})
    ti_fx.Pipeline(DecomposeAttention())(plain)
    torch.testing.assert_close(plain(x=x), model(x), rtol=0, atol=1e-6)


def renamed(gm: GraphModule, seed: int) -> tuple[GraphModule, dict[str, str]]:
    """Return a copy with random names of modules, parameters, nodes and class, and no module stack."""
    copied = copy.deepcopy(gm)
    generator = random.Random(seed)
    words = [f"{chr(97 + index % 26)}{index}z" for index in range(3 * len(copied.graph.nodes))]
    generator.shuffle(words)
    names: dict[str, str] = {}
    targets: dict[str, str] = {}
    kept = {str(node.target) for node in copied.graph.find_nodes(op="placeholder")}
    for node in copied.graph.nodes:
        node.meta.pop("nn_module_stack", None)
        node.meta.pop("stack_trace", None)
        if node.op in ("get_attr", "call_module"):
            if node.target not in targets:
                new = f"{words.pop()}.{words.pop()}"
                found: Any = (
                    tensor(copied, node.target)
                    if node.op == "get_attr"
                    else copied.get_submodule(node.target)
                )
                register(copied, new, found)
                targets[node.target] = new
            node.target = targets[node.target]
        if node.op not in ("placeholder", "output") and node.name not in kept:
            old, new = node.name, words.pop()
            node._rename(new)
            names[old] = node.name
    copied.__class__.__name__ = words.pop()
    copied.recompile()
    return copied, {**names, **targets}


def described(site: AttentionSite, names: dict[str, str]) -> str:
    parts = {
        part: names.get(node.name, node.name) for part, node in vars(site).items() if isinstance(node, Node)
    }
    return f"{site.where} {parts}"


def test_no_name_matters(tiny: Tiny) -> None:
    plain = copy.deepcopy(tiny.graph)
    for node in plain.graph.nodes:
        node.meta.pop("nn_module_stack", None)
        node.meta.pop("stack_trace", None)
    other, names = renamed(plain, seed=1)
    sites, found = ti_fx.find_attention(plain), ti_fx.find_attention(other)
    assert [described(site, names) for site in sites] == [described(site, {}) for site in found]
    for passes in (
        (DecomposeAttention(), DuplicateTeacher()),
        (Ternarize(), QuantizeActivations(attention=True), Distill()),
        (Intervene("map"),),
    ):
        for gm in (plain, other):
            ti_fx.Pipeline(*passes)(gm)
        assert skeleton(plain) == skeleton(other)


def skeleton(gm: GraphModule) -> list[tuple[Any, ...]]:
    """Return the graph with numbers in place of names."""
    position = {node: index for index, node in enumerate(gm.graph.nodes)}
    return [
        (
            node.op,
            "" if node.op in ("get_attr", "call_module") else str(node.target),
            str(torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda source: position[source])),
            ti_fx.ir.roles.role(node),
            ti_fx.ir.roles.fact(node, "intervened"),
        )
        for node in gm.graph.nodes
    ]


def test_a_softmax_that_is_no_attention_is_no_site() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 2)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            weights = self.gate(x).softmax(-1)
            result: Tensor = x + sum(
                weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)
            )
            return result

    assert ti_fx.find_attention(ti_fx.capture(Router(), {"x": torch.randn(2, 3, 8)})) == []
