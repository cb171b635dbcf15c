"""Bit-for-bit equalities: outputs, teacher, interventions, and the student against a hand-written quantised model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.models.bert.modeling_bert as modeling_bert
from slow import slow
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import ti_fx
from ti_fx import numerics
from ti_fx.ir import roles
from ti_fx.ir.stages import PHASE
from ti_fx.numerics import losses
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
from ti_fx.passes.prepare.look_up_first import LookUpFirst

POINTS = ("map", "context", "output")
MODELS = ("bert", *slow("gpt2", "llama", "t5"))


def build(name: str) -> PreTrainedModel:
    """Return a tiny model with eager attention, dropout as configured by default, every parameter random."""
    torch.manual_seed(0)
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "bert": lambda: BertForSequenceClassification(
            BertConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                vocab_size=1100,
            )
        ),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=1100)),
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=64,
                vocab_size=1100,
            )
        ),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=64, vocab_size=1100)
        ),
    }
    model = models[name]()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(name: str) -> dict[str, Tensor]:
    """Return a padded batch of 3 rows and 6 tokens."""
    ids = torch.randint(2, 1100, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":
        inputs["decoder_input_ids"] = ids.flip(0)[:, :4].contiguous()
    return inputs


@cache
def _captured(name: str) -> tuple[PreTrainedModel, GraphModule]:
    model = build(name)
    return model, ti_fx.capture(model, batch(name))


def captured(name: str) -> tuple[PreTrainedModel, GraphModule]:
    """Return a model and its graph over the same tensors, fresh for each test."""
    return copy.deepcopy(_captured(name))


def prepared(name: str, **quantised: Any) -> tuple[PreTrainedModel, GraphModule]:
    """Return a model that shares nothing, and its graph with teacher, quantisers and losses."""
    model, gm = captured(name)
    untouched = copy.deepcopy(model)
    ti_fx.Pipeline(
        DecomposeAttention(), DuplicateTeacher(), Ternarize(), QuantizeActivations(**quantised), Distill()
    )(gm)
    return untouched, gm


class Recorder(Interpreter):
    """Run a graph node by node and keep what every node read and computed."""

    def __init__(self, gm: GraphModule, inputs: dict[str, Tensor], seed: int = 0) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[str, Any] = {}
        self.read: dict[str, list[Any]] = {}
        order = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
        torch.manual_seed(seed)
        self.result = self.run(*(inputs[name] for name in order), enable_io_processing=False)

    def run_node(self, n: Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        self.read[n.name] = [args, kwargs]
        value = super().run_node(n)
        self.values[n.name] = value
        return value


def eval_mode(model: PreTrainedModel) -> PreTrainedModel:
    model.eval()  # type: ignore[no-untyped-call]
    return model


def leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def assert_same(one: Any, other: Any) -> None:
    """Every tensor of two structures is bit-equal, dtype included."""
    assert len(leaves(one)) == len(leaves(other)) > 0
    for left, right in zip(leaves(one), leaves(other), strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def teacher_outputs(gm: GraphModule, recorder: Recorder) -> dict[str, Tensor]:
    """Return the teacher's value of every tensor that the model returns."""
    teacher = {node: twin for twin, node in roles.twins(gm.graph).items()}
    result = gm.graph.output_node().args[0]
    result = result["outputs"] if isinstance(result, dict) and "losses" in result else result
    assert isinstance(result, Node)
    value = recorder.values[teacher[result].name]
    return dict(value)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_duplicating_the_teacher_changes_no_output(name: str, training: bool) -> None:
    model, gm = captured(name)
    gm.train(training)
    torch.manual_seed(3)
    before = gm(**batch(name))
    ti_fx.Pipeline(DuplicateTeacher())(gm)
    torch.manual_seed(3)
    after = gm(**batch(name))
    assert_same(before, after)
    with torch.no_grad():
        expected = eval_mode(model)(**batch(name), use_cache=False)
    found = teacher_outputs(gm, Recorder(gm, batch(name)))
    for key, value in found.items():
        assert_same(value, expected[key])
    assert "logits" in found


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("point", [None, *POINTS])
@pytest.mark.parametrize("name", MODELS)
def test_the_prepared_teacher_is_the_original_model_in_eval_mode(
    name: str, point: str | None, training: bool
) -> None:
    model, gm = prepared(name)
    ti_fx.Pipeline(Intervene(at=point))(gm)
    gm.train(training)
    with torch.no_grad():
        expected = eval_mode(model)(**batch(name), use_cache=False)
    for key, value in teacher_outputs(gm, Recorder(gm, batch(name))).items():
        assert_same(value, expected[key])


def points_of(model: PreTrainedModel, name: str, inputs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Return map, merged context and output of each attention block, from the model's own modules in eval mode."""
    projection = {
        "bert": "attention.output.dense",
        "gpt2": "attn.c_proj",
        "llama": "self_attn.o_proj",
        "t5": "Attention.o",
    }
    found: dict[str, list[Tensor]] = {point: [] for point in POINTS}

    def keep(module: nn.Module, read: tuple[Tensor, ...], value: Tensor) -> None:
        found["context"].append(read[0])
        found["output"].append(value)

    registered = [
        module.register_forward_hook(keep)
        for path, module in model.named_modules()
        if path.endswith(projection[name])
    ]
    with torch.no_grad():
        result = eval_mode(model)(**inputs, use_cache=False, output_attentions=True)
    for each in registered:
        each.remove()
    if name == "t5":
        pairs = zip(result.decoder_attentions, result.cross_attentions, strict=True)
        found["map"] = [*result.encoder_attentions, *(value for pair in pairs for value in pair)]
    else:
        found["map"] = list(result.attentions)
    return found


def merged(context: Tensor) -> Tensor:
    """Return ``(batch, tokens, width)`` from ``(batch, heads, tokens, head size)``."""
    return context.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", MODELS)
def test_consumers_of_an_intervened_point_read_the_teachers_value(name: str, point: str) -> None:
    model, gm = prepared(name)
    gm.train()
    reads: list[tuple[str, str, int]] = []  # tap, consumer, the index of the argument
    sites = ti_fx.find_attention(gm)
    for site in sites:
        tap = site.at(point)
        assert tap is not None
        consumers = [node for node in tap.users if roles.role(node) == "student"]
        assert consumers
        reads += [(tap.name, node.name, node.args.index(tap)) for node in consumers]
    own = Recorder(gm, batch(name))
    ti_fx.Pipeline(Intervene(at=point))(gm)
    recorder = Recorder(gm, batch(name))
    expected = points_of(model, name, batch(name))[point]
    taps = list(dict.fromkeys(tap for tap, _, _ in reads))
    assert len(taps) == len(sites) == len(expected)
    for name_of_tap, consumer, position in reads:
        value = recorder.read[consumer][0][position]
        target = expected[taps.index(name_of_tap)]
        # GPT-2's projections are addmm over (batch · tokens, width)
        assert_same(merged(value) if point == "context" else value.view_as(target), target)
        assert not torch.equal(value, recorder.values[name_of_tap])
        assert not torch.equal(value, own.read[consumer][0][position])
    ti_fx.Pipeline(Intervene())(gm)
    assert_same(Recorder(gm, batch(name)).result, own.result)


@pytest.mark.parametrize("name", MODELS)
def test_the_teacher_is_the_same_after_training(name: str) -> None:
    _, gm = prepared(name)
    gm.train()
    frozen = {
        key: value.detach().clone() for key, value in gm.named_parameters() if key.startswith("teacher.")
    }
    latent = {
        key: value.detach().clone() for key, value in gm.named_parameters() if not key.startswith("teacher.")
    }
    assert frozen
    # the whole list, as a user would write it: the frozen ones have no gradient and are skipped
    optimiser = torch.optim.AdamW(gm.parameters(), lr=1e-2)
    for point in ("output", "map", None):
        ti_fx.Pipeline(Intervene(at=point))(gm)
        optimiser.zero_grad()
        gm(**batch(name))["loss"].backward()
        optimiser.step()
    for key, before in frozen.items():
        value = gm.get_parameter(key)
        assert_same(value.detach(), before)
        assert value.grad is None
        assert not value.requires_grad
    unchanged = [key for key, before in latent.items() if torch.equal(gm.get_parameter(key), before)]
    assert not unchanged


def ternary_by_hand(weight: Tensor, rows: bool) -> Tensor:
    """Return the ternary weight, in float32, from the formula (Ternary Weight Networks, with the clip at 2.5)."""
    clamped = weight.clamp(-2.5, 2.5)
    dims = [1] if rows else [0, 1]
    threshold = 0.7 * clamped.abs().mean(dims, keepdim=True)
    kept = (clamped.abs() > threshold).float()
    scale = (clamped.abs() * kept).sum(dims, keepdim=True) / kept.sum(dims, keepdim=True).clamp(min=1)
    return torch.sign(clamped) * kept * scale


def quantised_by_hand(value: Tensor, encoding: str) -> Tensor:
    """Return what ONNX DynamicQuantizeLinear and DequantizeLinear give (``int8-tensor``), in the value's dtype."""
    if encoding == "float":
        return value
    x = value.detach().float()
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (torch.tensor(high) - torch.tensor(low)) / 255
    zero_point = (-torch.tensor(low) / scale).round()
    codes = ((x / scale).round() + zero_point).clamp(0, 255)
    return ((codes - zero_point) * scale).to(value.dtype)


def quantise_by_hand(
    model: PreTrainedModel, encoding: str, attention: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make transformers' own BERT compute with ternary weights and quantised activations."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "classifier":

            def linear(x: Tensor, module: nn.Linear = module) -> Tensor:
                return F.linear(
                    quantised_by_hand(x, encoding), ternary_by_hand(module.weight, False), module.bias
                )

            module.forward = linear  # type: ignore[method-assign, assignment]
        if path.endswith("word_embeddings"):
            assert isinstance(module, nn.Embedding)

            def embedding(ids: Tensor, module: nn.Embedding = module) -> Tensor:
                return F.embedding(ids, ternary_by_hand(module.weight, True))

            module.forward = embedding  # type: ignore[method-assign, assignment]

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        dropout: float,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        def quantised(tensor: Tensor) -> Tensor:
            return quantised_by_hand(tensor, encoding) if attention else tensor

        scores = torch.matmul(quantised(query), quantised(key).transpose(2, 3)) * scaling
        if attention_mask is not None:
            scores = scores + attention_mask
        map_ = F.dropout(scores.softmax(-1), p=dropout, training=module.training)
        return torch.matmul(quantised(map_), quantised(value)).transpose(1, 2).contiguous(), map_

    monkeypatch.setattr(modeling_bert, "eager_attention_forward", attend)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("encoding", ["int8-tensor", "float"])
def test_the_stripped_student_is_a_hand_written_quantised_model(
    encoding: str, attention: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, gm = prepared("bert", encoding=encoding, attention=attention)
    ti_fx.Pipeline(Intervene(at="map"), Strip())(gm)
    quantise_by_hand(model, encoding, attention, monkeypatch)
    for training in (True, False):
        model.train(training)
        gm.train(training)
        torch.manual_seed(2)
        expected = model(**batch("bert"))
        torch.manual_seed(2)
        assert_same(gm(**batch("bert")).logits, expected.logits)
    ti_fx.Pipeline(Pack())(gm)
    assert_same(gm(**batch("bert")).logits, expected.logits)


@pytest.mark.parametrize("name", MODELS)
def test_packing_changes_no_output(name: str) -> None:
    _, gm = prepared(name, encoding="int8-tensor")
    ti_fx.Pipeline(Strip())(gm.eval())
    before = gm(**batch(name))
    ti_fx.Pipeline(Pack())(gm)
    assert_same(gm(**batch(name)), before)


@pytest.mark.parametrize("name", MODELS)
def test_quantiser_statistics_are_in_float32_under_bfloat16_autocast(name: str) -> None:
    _, gm = prepared(name, encoding="int8-tensor", attention=True)
    gm.eval()
    plain = Recorder(gm, batch(name))
    with torch.autocast("cpu", torch.bfloat16):
        recorder = Recorder(gm, batch(name))
    dtypes = set()
    for node in gm.graph.nodes:
        if node.target is numerics.ternary:
            assert_same(recorder.values[node.name], plain.values[node.name])
        if node.target is numerics.int8_tensor:
            read, value = recorder.values[node.args[0].name], recorder.values[node.name]
            assert_same(value, quantised_by_hand(read, "int8-tensor"))
            dtypes.add(value.dtype)
    assert torch.bfloat16 in dtypes
    compared = [node for node in gm.graph.nodes if roles.role(node) == "loss"]
    assert compared
    assert all(recorder.values[node.name].dtype == torch.float32 for node in compared)


def test_a_bfloat16_weight_has_float32_statistics() -> None:
    weight = torch.randn(40, 30).bfloat16()
    codes, scale = numerics.ternary_codes(weight)
    assert scale.dtype == torch.float32
    expected = ternary_by_hand(weight.float(), False)
    torch.testing.assert_close(codes * scale, expected, rtol=0, atol=0)
    assert_same(numerics.ternary(weight), expected.bfloat16())


@pytest.mark.parametrize("name", MODELS)
def test_quantising_only_the_looked_up_rows_changes_no_value_and_no_gradient(name: str) -> None:
    _, gm = prepared(name)
    gm.train()

    def step(graph: GraphModule) -> tuple[Tensor, dict[str, Tensor | None]]:
        graph.zero_grad(set_to_none=True)
        torch.manual_seed(4)
        loss = graph(**batch(name))["loss"]
        loss.backward()
        return loss.detach(), {key: value.grad for key, value in graph.named_parameters()}

    loss, gradients = step(gm)
    fork = ti_fx.fork(gm)
    ti_fx.Pipeline(LookUpFirst(), stage=PHASE)(fork)
    tied = name == "t5" or name == "gpt2"  # the head reads the table as well
    assert any(node.target is numerics.ternary_embedding for node in fork.graph.nodes) is not tied
    again, others = step(fork)
    assert_same(again, loss)
    for key, gradient in gradients.items():
        other = others[key]
        assert (gradient is None) == (other is None), key
        if gradient is not None and other is not None:
            assert torch.equal(gradient, other), key


@pytest.mark.slow
def test_each_stack_is_masked_by_its_own_padding() -> None:
    """Padding is left out by the mask of the token's own stack, also where a projection flattens the tokens."""
    _, gm = captured("t5")
    ti_fx.Pipeline(DuplicateTeacher(), Ternarize(), Distill(mask_padding=True))(gm)
    masks = {node.name: node.args[2] for node in gm.graph.nodes if node.target is losses.scores_error}
    # two encoder blocks, then two decoder layers of two blocks; the decoder has no mask among the inputs
    assert [str(mask) for mask in masks.values()] == ["attention_mask"] * 2 + ["None"] * 4
    _, gm = captured("gpt2")
    ti_fx.Pipeline(DuplicateTeacher(), Ternarize(), Distill(mask_padding=True, variant="paper"))(gm)
    recorder = Recorder(gm.eval(), batch("gpt2"))
    kept = batch("gpt2")["attention_mask"].flatten() == 1
    teacher = {node: twin for twin, node in roles.twins(gm.graph).items()}
    expected = torch.zeros(())
    for site in ti_fx.find_attention(gm):
        assert site.output is not None
        difference = recorder.values[site.output.name] - recorder.values[teacher[site.output].name]
        expected += difference[kept].square().mean()
    torch.testing.assert_close(recorder.result["losses"]["attention_outputs"], expected)
