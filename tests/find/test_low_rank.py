"""The matrices of low-rank adapters stay in full precision beside the ternary weight that they are added to."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import VOCABULARY, PlainTransformer, bert_model, seeded, text_example
from slow import slow
from tiny_training import batch, trainer
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx import Pipeline, Recipe
from ti_fx.analysis import stored_weights
from ti_fx.errors import InputError
from ti_fx.passes import DuplicateTeacher, Intervene, QuantizeActivations, Ternarize


class LoRA(nn.Module):
    """As peft writes it: ``base(x) + B(A(dropout(x))) * scaling``."""

    def __init__(self, base: nn.Linear, rank: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.lora_B(self.lora_A(self.dropout(x))) * 2.0
        return result


class Factors(LoRA):
    """As loralib writes it: plain Parameters, transposed."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x)
        few = self.dropout(x) @ self.lora_A.weight.transpose(0, 1)
        result = result + (few @ self.lora_B.weight.transpose(0, 1)) * 2.0
        return result


class Two(LoRA):
    """Two adapters of one layer, added in turn."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.other_lora_A = nn.Linear(base.in_features, 1, bias=False)
        self.other_lora_B = nn.Linear(1, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x)
        result += self.other_lora_B(self.other_lora_A(x)) / 3.0
        return result


class Within(LoRA):
    """The product is added to the weight itself."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.lora_B.weight @ self.lora_A.weight
        result: Tensor = F.linear(x, weight, self.base.bias)
        return result


class WordsLoRA(nn.Module):
    """An adapter of a word embedding."""

    def __init__(self, base: nn.Embedding, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.randn(rank, base.num_embeddings))
        self.lora_B = nn.Parameter(torch.randn(base.embedding_dim, rank))

    def forward(self, ids: Tensor) -> Tensor:
        few = F.embedding(ids, self.lora_A.T)
        result: Tensor = self.base(ids) + (few @ self.lora_B.T) * 2.0
        return result


Wrap = Callable[[nn.Linear], nn.Module]


def adapted(wrap: Wrap) -> PlainTransformer:
    """A transformer with an adapter in each projection and in the word embedding."""

    def make() -> PlainTransformer:
        model = PlainTransformer(layers=1)
        block: Any = model.blocks[0]
        for name in ("q", "v", "o"):
            setattr(block, name, wrap(getattr(block, name)))
        block.feed_forward[2] = wrap(block.feed_forward[2])
        model.words = WordsLoRA(model.words)  # type: ignore[assignment]
        return model

    return seeded(make)


def graph(model: nn.Module) -> GraphModule:
    example = text_example()
    return ti_fx.capture(model, {"tokens": example["input_ids"], "keep": example["attention_mask"]})


def ternary(gm: GraphModule) -> set[str]:
    return {row.name for row in stored_weights(gm) if row.is_ternary}


BASES = {f"blocks.0.{name}.base.weight" for name in ("q", "v", "o", "feed_forward.2")}
OTHERS = {"blocks.0.k.weight", "blocks.0.feed_forward.0.weight", "words.base.weight"}


@pytest.mark.parametrize("wrap", [LoRA, *slow(Factors, Two)])
def test_the_layers_are_ternary_and_the_adapters_are_not(wrap: Wrap) -> None:
    gm = graph(adapted(wrap))
    assert ternary(gm) == BASES | OTHERS
    reasons = {row.name: row.reason for row in stored_weights(gm)}
    assert reasons["blocks.0.q.lora_B.weight"].startswith(
        "low-rank adapter of blocks.0.q.base.weight; merged"
    )
    assert reasons["words.lora_A"].startswith("low-rank adapter of words.base.weight")
    Pipeline(DuplicateTeacher(), Ternarize(), QuantizeActivations(), Ternarize())(gm)
    assert ternary(gm) == BASES | OTHERS


def test_an_adapter_within_the_weight() -> None:
    gm = graph(adapted(Within))
    assert ternary(gm) == OTHERS
    reasons = {row.name: row.reason for row in stored_weights(gm)}
    assert "a weight is computed from it" in reasons["blocks.0.q.lora_A.weight"]


class Bottleneck(LoRA):
    """No adapter of the layer: a nonlinearity lies between."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.lora_B(torch.relu(self.lora_A(x)))
        return result


class Wide(LoRA):
    """No low rank: the two have more entries than the weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base, rank=math.ceil(base.in_features * base.out_features / 32))


class Chain(LoRA):
    """A factorised layer: nothing is added to it but the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.lora_B(self.lora_A(x)) * 2.0 + self.base.bias
        return result


@pytest.mark.parametrize("wrap", [Bottleneck, *slow(Wide, Chain)])
def test_what_is_no_adapter(wrap: Wrap) -> None:
    found = ternary(graph(adapted(wrap)))
    assert {"blocks.0.q.lora_A.weight", "blocks.0.q.lora_B.weight"} <= found


def test_learned_queries_are_projected_by_a_ternary_weight() -> None:
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(VOCABULARY, 16)
            self.queries = nn.Parameter(torch.randn(4, 16))
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
            self.classify = nn.Linear(16, 3)

        def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
            x = self.words(tokens)
            scores = self.q(self.queries) @ self.k(x).transpose(1, 2) + (keep - 1)[:, None] * 100.0
            logits: Tensor = self.classify(self.o(scores.softmax(-1) @ self.v(x)).mean(1))
            return logits

    assert {"q.weight", "k.weight", "v.weight", "o.weight"} <= ternary(graph(seeded(Pooling)))


@pytest.mark.slow
def test_a_trainer_of_adapters(tmp_path: Path) -> None:
    """Frozen layers are refused with the way out; with layers that train, the adapters train, too."""
    model = bert_model(layers=1)
    attention: Any = model.get_submodule("bert.encoder.layer.0.attention.self")
    attention.query = LoRA(attention.query)
    for name, value in model.named_parameters():
        value.requires_grad_("lora" in name or "classifier" in name)
    gm = ti_fx.capture(model, batch())
    with pytest.raises(InputError, match=r"ternary weights are frozen.*merge_and_unload\(\) first"):
        trainer(tmp_path, Recipe("lora"), model=ti_fx.fork(gm))
    gm.requires_grad_(True)
    made = trainer(tmp_path, Recipe("lora"), model=gm, arguments_options={"max_steps": 1, "warmup_steps": 0})
    name = "bert.encoder.layer.0.attention.self.query.lora_B.weight"
    before = made.model.prepared().get_parameter(name).detach().clone()
    made.train()
    assert not torch.equal(made.model.prepared().get_parameter(name), before)
    for point in ("map", "context", "output"):
        Pipeline(Intervene(point))(ti_fx.fork(made.model.prepared()))
