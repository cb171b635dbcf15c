"""Two students that are quick to export: a BERT of one layer, and two linear layers with a norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import BertConfig, BertForSequenceClassification

import ti_fx
from ti_fx.export.file.companions import COMPANIONS
from ti_fx.passes import Pack, QuantizeActivations, Strip, Ternarize

VOCABULARY = 1100


def bert_example(batch: int = 3, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones(batch, length, dtype=torch.long)}


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        id2label={0: "a", 1: "b", 2: "c"},
    )
    model = BertForSequenceClassification(config)
    model.train(False)
    return model


def packed(
    model: nn.Module, example: dict[str, Tensor], encoding: str = "int8-tensor", **options: Any
) -> GraphModule:
    gm = ti_fx.capture(model, example)
    passes = [Ternarize(**options.pop("ternarize", {})), QuantizeActivations(encoding=encoding, **options)]
    ti_fx.Pipeline(*passes, Strip(), Pack())(gm)
    return gm


class Layers(nn.Module):
    """Two ternary layers with a norm, on floating inputs: quick to export."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)
        nn.init.normal_(self.first.bias, std=2.0)

    def forward(self, values: Tensor) -> dict[str, Tensor]:
        hidden = nn.functional.gelu(self.first(values))
        return {"logits": self.head(self.norm(values + self.second(hidden)))}


def layers_example(batch: int = 3) -> dict[str, Tensor]:
    return {"values": torch.randn(batch, 5, 16, generator=torch.Generator().manual_seed(2))}


def without_record(path: Path) -> None:
    """Make a file as an older ti_fx wrote it."""
    model = onnx.load(path)
    kept = [entry for entry in model.metadata_props if entry.key != COMPANIONS]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, path)
