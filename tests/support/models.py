"""Tiny models of each kind, captured once a session: tests fork or prepare them, and never train them in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import ti_fx
from ti_fx.passes import DecomposeAttention, Distill, DuplicateTeacher, QuantizeActivations, Ternarize

Made = TypeVar("Made")
VOCABULARY = 1100  # above Ternarize's min_rows, so that the word embedding is ternary


@dataclass(frozen=True)
class Tiny:
    """A model, inputs that fit it, and its captured graph."""

    name: str
    model: nn.Module
    example: dict[str, Tensor]
    graph: GraphModule

    def fork(self) -> GraphModule:
        """Return a graph that a test may rewrite."""
        return ti_fx.fork(self.graph)


def bert_model(layers: int = 2, **options: Any) -> BertForSequenceClassification:
    settings: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "num_labels": 3,
    }
    return seeded(lambda: BertForSequenceClassification(BertConfig(**{**settings, **options})))


def gpt2_model(**options: Any) -> GPT2LMHeadModel:
    settings: dict[str, Any] = {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": VOCABULARY,
        "n_positions": 32,
        "use_cache": False,
    }
    return seeded(lambda: GPT2LMHeadModel(GPT2Config(**{**settings, **options})))


def t5_model(**options: Any) -> T5ForConditionalGeneration:
    settings: dict[str, Any] = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": VOCABULARY,
        "use_cache": False,
    }
    return seeded(lambda: T5ForConditionalGeneration(T5Config(**{**settings, **options})))


def vit_model(**options: Any) -> ViTForImageClassification:
    settings: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 8,
        "patch_size": 4,
        "num_labels": 3,
    }
    return seeded(lambda: ViTForImageClassification(ViTConfig(**{**settings, **options})))


def llama_model(**options: Any) -> LlamaForCausalLM:
    settings: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "use_cache": False,
    }
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**{**settings, **options})))


class PlainBlock(nn.Module):
    """A pre-norm transformer block as people write it by hand, with torch's fused attention."""

    def __init__(self, size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.before = nn.LayerNorm(size)
        self.q, self.k, self.v, self.o = (nn.Linear(size, size) for _ in range(4))
        self.middle = nn.LayerNorm(size)
        self.feed_forward = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def split(self, value: Tensor) -> Tensor:
        return torch.unflatten(value, -1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.before(x)
        context = nn.functional.scaled_dot_product_attention(
            self.split(self.q(normed)),
            self.split(self.k(normed)),
            self.split(self.v(normed)),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        x = x + self.o(context.transpose(1, 2).flatten(2))
        after: Tensor = x + self.feed_forward(self.middle(x))
        return after


class PlainTransformer(nn.Module):
    """A classifier in plain PyTorch: no library's class names, a boolean mask, fused attention."""

    def __init__(self, layers: int = 2, size: int = 16, heads: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, size)
        self.blocks = nn.ModuleList(PlainBlock(size, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(size)
        self.classify = nn.Linear(size, 3)

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        x = self.words(tokens)
        mask = keep.bool()[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        logits: Tensor = self.classify(self.norm(x)[:, 0])
        return logits


class TorchEncoder(nn.Module):
    """torch.nn's own TransformerEncoder."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.encoder(features)
        return result


def seeded(make: Callable[[], Made]) -> Made:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def tokens(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def text_example(batch: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Token ids and a mask that pads the last row's last two tokens."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1:, -2:] = 0
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


_CAPTURED: list[Tiny] = []


def _tiny(name: str, model: nn.Module, example: dict[str, Tensor]) -> Tiny:
    _CAPTURED.append(Tiny(name, model, example, ti_fx.capture(model, example)))
    return _CAPTURED[-1]


@pytest.fixture(autouse=True)
def _modes() -> Iterator[None]:
    """Put the models back in training mode: a fork's ``eval()`` shows in every graph that shares its leaves."""
    yield
    for tiny in _CAPTURED:
        tiny.graph.train()


def _features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def bert() -> Tiny:
    return _tiny("bert", bert_model(), text_example())


@pytest.fixture(scope="session")
def bert_layer() -> Tiny:
    """One layer, for golden texts."""
    return _tiny("bert", bert_model(layers=1), text_example())


@pytest.fixture(scope="session")
def gpt2() -> Tiny:
    return _tiny("gpt2", gpt2_model(), text_example())


@pytest.fixture(scope="session")
def t5() -> Tiny:
    return _tiny("t5", t5_model(), {**text_example(), "decoder_input_ids": tokens(3, 5)})


@pytest.fixture(scope="session")
def vit() -> Tiny:
    return _tiny("vit", vit_model(), {"pixel_values": _features(2, 3, 8, 8)})


@pytest.fixture(scope="session")
def llama() -> Tiny:
    return _tiny("llama", llama_model(), text_example())


@pytest.fixture(scope="session")
def torch_encoder() -> Tiny:
    return _tiny("torch_encoder", seeded(TorchEncoder), {"features": _features(3, 7, 16)})


@pytest.fixture(scope="session")
def plain() -> Tiny:
    return _tiny(
        "plain", seeded(PlainTransformer), {"tokens": tokens(), "keep": text_example()["attention_mask"]}
    )


ALL = ("bert", "gpt2", "t5", "vit", "llama", "torch_encoder", "plain")
SLOW = (
    "gpt2",
    "t5",
    "vit",
    "llama",
    "torch_encoder",
    "plain",
)  # `make test-full` has each test of `tiny` on these, too


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in ALL],
)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """Each tiny model in turn."""
    found: Tiny = request.getfixturevalue(request.param)
    return found


def prepared(tiny: Tiny) -> GraphModule:
    """Return a fork with teacher, ternary weights, quantised activations and losses."""
    gm = tiny.fork()
    ti_fx.Pipeline(DecomposeAttention(), DuplicateTeacher(), Ternarize(), QuantizeActivations(), Distill())(
        gm
    )
    return gm


@pytest.fixture(scope="session")
def prepared_bert(bert: Tiny) -> GraphModule:
    """BERT with everything but an intervention; tests fork it."""
    return prepared(bert)
