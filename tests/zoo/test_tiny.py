"""Tiny models of transformers' types: they build, run at two sizes, and attention in them is counted and matters."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from ti_fx.errors import DataError
from ti_fx.example_inputs.makers import run
from ti_fx.zoo import Entry, build, model_types
from ti_fx.zoo.count import attention_calls, replaced, uniform, uniform_effect
from ti_fx.zoo.exclusions import EXCLUSIONS
from ti_fx.zoo.redraw import redraw

# Blocks by hand: two layers each; an encoder-decoder has self-attention in both stacks and cross-attention in one.
BLOCKS = {
    "bert": 2,
    "albert": 2,  # one layer, run twice
    "deberta-v2": 2,
    "longformer": 2,
    "reformer": 2,  # its softmax is written with logsumexp
    "gpt2": 2,
    "llama": 2,
    "mixtral": 2,  # and two routers, which are not counted
    "jamba": 1,  # the other layer is a Mamba layer
    "t5": 6,
    "vit": 2,
    "swin": 8,  # two in each of four stages
    "whisper": 6,
    "wav2vec2": 2,
    "clip": 2,
    "llava": 3,  # the vision tower's last layer is left out
    "qwen2_vl": 6,  # the vision tower attends to one image after the other, and there are two
}
WITHOUT = ["mamba", "resnet", "fnet", "mobilevitv2", "rwkv"]


@cache
def entry(name: str, attention: str = "eager") -> Entry:
    return build(name, attention)


def blocks(made: Entry) -> int:
    return sum(call.has_value and call.used for call in attention_calls(made.model, made.example))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_type_builds_and_runs_at_two_batch_sizes(name: str) -> None:
    made = entry(name)
    assert not made.model.training
    assert sum(parameter.numel() for parameter in made.model.parameters()) < 3_000_000
    assert made.example.keys() == made.other.keys()
    for inputs in (made.example, made.other):
        assert all(not tensor.is_floating_point() or tensor.isfinite().all() for tensor in inputs.values())
        run(made.model, inputs)
    if "input_ids" in made.example:
        assert made.example["input_ids"].shape[0] == 2
        assert made.other["input_ids"].shape[0] == 3
        assert made.example["input_ids"].shape[1] != made.other["input_ids"].shape[1]
        assert made.example["attention_mask"][:, -1].tolist() == [1, 0]


@pytest.mark.parametrize("name", BLOCKS)
def test_attention_blocks_are_counted_as_by_hand(name: str) -> None:
    assert blocks(entry(name)) == BLOCKS[name]


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit", "whisper"])
def test_a_fused_attention_counts_like_an_eager_one(name: str) -> None:
    assert blocks(entry(name, "sdpa")) == BLOCKS[name]


@pytest.mark.parametrize("name", WITHOUT)
def test_models_without_attention_count_none(name: str) -> None:
    assert name in EXCLUSIONS
    assert blocks(entry(name)) == 0


def test_an_exclusion_names_a_line_that_is_there() -> None:
    models = Path(transformers.__file__).parent / "models"
    for name, exclusion in EXCLUSIONS.items():
        file, line = exclusion.source.split(":")
        assert len((models / file).read_text(encoding="utf-8").splitlines()) >= int(line), name
    assert EXCLUSIONS.keys() <= set(model_types())


@pytest.mark.parametrize("name", BLOCKS)
def test_a_uniform_map_moves_the_outputs_by_a_hundredth(name: str) -> None:
    assert min(uniform_effect(entry(name))) >= 0.01


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_fused_map_is_replaced_as_the_eager_one_is(name: str, index: int) -> None:
    outputs = []
    for attention in ("eager", "sdpa"):
        made = entry(name, attention)
        with replaced(made.model, index, uniform):
            outputs.append(run(made.model, made.example).logits)
    # The same sums in another order, in float32. A padded row's own outputs are not compared: its mask is empty.
    torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=1e-4, atol=1e-5)


def test_the_same_seed_draws_the_same_model_and_another_seed_another() -> None:
    first, again, other = build("bert"), build("bert"), build("bert", seed=1)
    for one, two, three in zip(
        first.model.parameters(), again.model.parameters(), other.model.parameters(), strict=True
    ):
        assert torch.equal(one, two)
        assert not torch.equal(one, three)
    assert torch.equal(first.example["input_ids"], again.example["input_ids"])


def test_calls_name_the_module_and_the_line() -> None:
    first, second = attention_calls(entry("bert").model, entry("bert").example)
    assert (first.index, second.index) == (0, 1)
    assert first.module == "bert.encoder.layer.0.attention.self"
    assert first.source.startswith("transformers/models/bert/modeling_bert.py:")
    assert first.shape == (2, 4, 12, 12)


class Parts(nn.Module):
    """An attention block, a router, a contrastive softmax and a block that no output reads."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.router = (nn.Linear(8, 8) for _ in range(4))
        self.queries = nn.Parameter(torch.ones(3, 8))

    def attend(self, x: Tensor) -> Tensor:
        scores = self.query(self.queries) @ self.key(x).transpose(-1, -2) / math.sqrt(8)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        context: Tensor = (weights / weights.sum(-1, keepdim=True)) @ self.value(x)
        return context

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        torch.softmax(x @ x.transpose(-1, -2), dim=-1) @ x
        routed = torch.softmax(self.router(x), dim=-1)
        similar = torch.softmax(self.query(x) @ self.key(x).transpose(-1, -2), dim=-1)
        return {"attended": self.attend(x), "routed": routed, "similar": similar}


def test_what_is_no_attention_or_is_not_used_is_told_apart() -> None:
    calls = attention_calls(Parts(), {"x": torch.randn(2, 5, 8)})
    assert [(call.op, call.has_value, call.used) for call in calls] == [
        ("aten::_softmax", True, False),
        ("aten::_softmax", False, True),
        ("exp/sum", True, True),
    ]


def test_a_map_over_equal_values_is_moot() -> None:
    (block,) = [call for call in attention_calls(Parts(), {"x": torch.ones(2, 5, 8)}) if call.op == "exp/sum"]
    assert block.moot


def test_redrawing_leaves_buffers_and_keeps_tied_tensors_tied() -> None:
    model = build("bert").model
    assert isinstance(model, nn.Module)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    names = [name for name, _ in model.named_parameters()]
    redraw(model, 5)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bart_", "unknown model type 'bart_'; did you mean 'bart'"),
        ("bark", "bark: BarkModel has no forward"),
        ("sam2_video", "sam2_video: the forward takes an inference session"),
    ],
)
def test_a_type_that_is_not_built_says_why(name: str, message: str) -> None:
    with pytest.raises(DataError) as raised:
        build(name)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_type_without_fused_attention_says_so() -> None:
    with pytest.raises(DataError, match=r"^reformer: a class of its model has no sdpa attention; use eager$"):
        build("reformer", "sdpa")


def test_every_type_of_the_installed_transformers_is_listed() -> None:
    types = model_types()
    assert types == sorted(types)
    assert len(types) >= 600
