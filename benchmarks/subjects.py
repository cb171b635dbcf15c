"""The models of the inference benchmark: what they are, what they are fed, and the arithmetic of one run.

Encoders classify ``[batch, sequence]`` tokens; decoders read one new token after ``past`` cached ones. But for MiniLM
the weights are random, with a fixed seed: values don't change the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
)
from transformers.cache_utils import DynamicCache, DynamicLayer

from ti_fx.demo.data import model_folder

Feed = dict[str, NDArray[Any]]
ERROR_TOKENS = 32  # of each row on which errors are measured
ERROR_ROWS = 8  # of an encoder, which has few logits a row


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        name: as ``--model`` names it.
        config: makes its configuration.
        decodes: whether it is a causal language model, measured token by token with a cache.
        family: what ONNX Runtime's transformer optimiser calls it.
        folder: finds its weights; None makes random ones.
    """

    name: str
    config: Callable[[], Any]
    decodes: bool
    family: str
    folder: Callable[[], Path] | None = None

    def save(self, folder: Path) -> None:
        """Write the model as transformers does, random where there are no weights."""
        if self.folder is not None:
            model = self.load(self.folder())
        else:
            torch.manual_seed(0)
            model = self._class().from_config(self.config())
        model.save_pretrained(folder)

    def load(self, folder: Path, attention: str = "sdpa") -> Any:
        """Return the saved model, ready for inference."""
        return self._class().from_pretrained(folder, attn_implementation=attention).eval()

    def example(self) -> dict[str, Tensor]:
        """Return inputs to capture it with: int64 ``[2, 16]``."""
        return self._tokens(2, 16)

    def error_inputs(self) -> dict[str, Tensor]:
        """Return inputs to compare logits on: a decoder's two rows, or an encoder's eight, some half padding."""
        if self.decodes:
            return self._tokens(2, ERROR_TOKENS)
        found = self._tokens(ERROR_ROWS, ERROR_TOKENS)
        found["attention_mask"][1::2, ERROR_TOKENS // 2 :] = 0
        return found

    def error_feed(self) -> Feed:
        """Return the same for a file: a decoder reads all tokens at once, after an empty cache."""
        return self._arrays(self.error_inputs(), 0)

    def feed(self, batch: int, sequence: int, prefill: bool = False) -> Feed:
        """Return what is timed: ``sequence`` tokens, or a decoder's next one after them, unless ``prefill``."""
        if self.decodes and not prefill:
            return self._arrays(self._tokens(batch, 1), sequence)
        return self._arrays(self._tokens(batch, sequence), 0)

    def export_feed(self) -> Feed:
        """Return a decoder's inputs to trace it with: three tokens after five, so that no two sizes are equal."""
        return self._arrays(self._tokens(2, 3), 5)

    def first_feed(self) -> Feed:
        """Return the inference after which memory is measured: 128 tokens, or a decoder's first one."""
        return self._arrays(self._tokens(1, 1 if self.decodes else 128), 0)

    def operations(self, feed: Feed) -> int:
        """Return the floating-point operations of one run: twice the multiplications of all products."""
        with torch.device("meta"):
            model = self._class().from_config(self.config(), attn_implementation="eager").eval()
        given: dict[str, Tensor | None] = {
            name: torch.empty_like(torch.from_numpy(value), device="meta") for name, value in feed.items()
        }
        given["attention_mask"] = None  # its values would be read, and a tensor without values has none
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            self.runnable(model)(*given.values())
        return int(counter.get_total_flops())

    def runnable(self, model: nn.Module) -> nn.Module:
        """Return the module that takes the feed's values in their order and gives logits first."""
        return Decoder(model) if self.decodes else Encoder(model)

    def _class(self) -> Any:
        return AutoModelForCausalLM if self.decodes else AutoModelForSequenceClassification

    def _tokens(self, batch: int, count: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, int(self.config().vocab_size), (batch, count), generator=generator)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return found if self.decodes else found | {"token_type_ids": torch.zeros_like(ids)}

    def _arrays(self, tokens: Mapping[str, Tensor], past: int) -> Feed:
        found: Feed = {name: value.numpy() for name, value in tokens.items()}
        if not self.decodes:
            return found
        config = self.config()
        batch, count = found["input_ids"].shape
        found["attention_mask"] = np.ones((batch, past + count), np.int64)
        found["position_ids"] = np.tile(np.arange(past, past + count), (batch, 1))
        shape = (batch, config.num_attention_heads, past, config.hidden_size // config.num_attention_heads)
        generator = np.random.default_rng(0)
        for layer in range(config.num_hidden_layers):
            for part in ("key", "value"):
                found[f"past_{part}_{layer}"] = generator.normal(0, 0.1, shape).astype(np.float32)
        return found


class Encoder(nn.Module):
    """A classifier that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the logits of one batch."""
        return (self.model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits,)


class Decoder(nn.Module):
    """A causal language model of tensors alone: keys and values, layer by layer, go in and come out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the logits of the new tokens, then each layer's keys and values."""
        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer: Any = DynamicLayer()  # type: ignore[no-untyped-call]
            layer.keys, layer.values = keys, values
            layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
            cache.layers.append(layer)
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        layers = found.past_key_values.layers
        return found.logits, *(value for layer in layers for value in (layer.keys, layer.values))


def _minilm() -> Any:
    return AutoConfig.from_pretrained(model_folder())


def _small_bert() -> BertConfig:
    return BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=2000
    )


def _small_gpt2() -> GPT2Config:
    return GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=2000)


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("minilm", _minilm, False, "bert", model_folder),
        Subject("bert-base", BertConfig, False, "bert"),
        Subject("gpt2", GPT2Config, True, "gpt2"),
    )
}
QUICK = {
    "minilm": Subject("minilm, small", _small_bert, False, "bert"),
    "bert-base": Subject("bert-base, small", _small_bert, False, "bert"),
    "gpt2": Subject("gpt2, small", _small_gpt2, True, "gpt2"),
}
