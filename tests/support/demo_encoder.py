"""A tiny encoder with the demo's own tokenizer, for tests of the demo's stages."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from ti_fx.demo.data import model_folder


def save_tiny_encoder(folder: Path) -> Path:
    """Save a one-layer BERT with random weights, always the same, and the tokenizer; return the folder."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
