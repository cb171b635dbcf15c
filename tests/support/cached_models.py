"""Students that generate token by token with a cache, in one file or two."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from models import llama_model, text_example, tokens
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

import ti_fx
from ti_fx.export import ExportReport, with_cache
from ti_fx.export.cached.encoder_decoder import EncoderDecoder
from ti_fx.export.run.generate import OnnxCausalLM, OnnxSeq2SeqLM
from ti_fx.ir.pipeline import Pass
from ti_fx.passes import Pack, QuantizeActivations, Strip, Ternarize

NEW = 12


@dataclass(frozen=True)
class Decoder:
    """A packed student, the same with its cache, and its file."""

    model: LlamaForCausalLM
    student: GraphModule
    cached: GraphModule
    report: ExportReport

    def generate(self, ids: Tensor, **options: Any) -> Tensor:
        """Generate in ONNX Runtime."""
        runtime: Any = OnnxCausalLM(self.report.path, self.model.config)
        found: Tensor = runtime.generate(
            ids, **{"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, **options}
        )
        return found


def in_eval(model: nn.Module) -> Any:
    model.train(False)
    return model


def differing(model: nn.Module) -> None:
    """Enlarge the weights, so that the scores of tokens differ clearly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() == 2 else None


def packed(
    model: nn.Module, example: dict[str, Tensor], pack: Pass | None = None, **options: object
) -> GraphModule:
    gm = ti_fx.capture(model, example)
    quantisers = QuantizeActivations("int8-token")  # a token's result does not depend on those beside it
    ti_fx.Pipeline(Ternarize(min_rows=32, **options), quantisers, Strip(), pack or Pack())(gm)  # type: ignore[arg-type]
    return gm.eval()


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@dataclass(frozen=True)
class Translator:
    """A packed encoder-decoder and its two files, which generate."""

    model: T5ForConditionalGeneration
    student: GraphModule
    reports: tuple[ExportReport, ExportReport]

    def generate(self, ids: Tensor, **options: Any) -> Tensor:
        """Generate in ONNX Runtime."""
        encoder, decoder = self.reports
        runtime: Any = OnnxSeq2SeqLM(encoder.path, decoder.path, self.model.config)
        settings = {
            "max_new_tokens": NEW,
            "eos_token_id": None,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
        }
        found: Tensor = runtime.generate(ids, **{**settings, **options})
        return found


def translation_example() -> dict[str, Tensor]:
    return {**text_example(batch=2), "decoder_input_ids": tokens(2, 5)}


def logits_of(parts: EncoderDecoder, example: dict[str, Tensor]) -> Tensor:
    """Return what the decoder's graph gives before any cache, of what the encoder's hands on."""
    encoder, decoder = parts
    given = {name: example[name] for name in decoder.inputs if name in example}
    given |= {name: value[:, :, :0] for name, value in decoder.inputs.items() if name.startswith("past_")}
    with torch.no_grad():
        kept = encoder.gm(**{name: example[name] for name in encoder.inputs})
        found: Tensor = decoder.gm(**given, **kept)["logits"]
    return found


class CachedStudent(NamedTuple):
    """A model, its packed student, the same with its cache, and the inputs that fit the latter."""

    model: LlamaForCausalLM
    student: GraphModule
    cached: GraphModule
    inputs: dict[str, Tensor]


@cache
def cached_llama() -> CachedStudent:
    """Return a tiny LLaMA with its student; made once a process, so a test changes none of it."""
    torch.manual_seed(0)
    model = in_eval(llama_model(num_hidden_layers=1))
    differing(model)
    example = text_example(batch=2)
    student = packed(model, example)
    return CachedStudent(model, student, *with_cache(student, model, example))
