"""Rows of unequal lengths and a tiny GPT-2 without dropout, for what is accumulated over micro-batches and devices."""

from __future__ import annotations

from typing import Any

import torch
from models import VOCABULARY
from tiny_training import LENGTH
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from ti_fx.passes import QuantizeActivations

REAL = (8, 8, 1, 1, 5, 8, 2, 3)
BY_TOKEN = QuantizeActivations(encoding="int8-token")  # a batch has no common range


def unequal_rows(causal: bool = False) -> Any:
    """Eight rows of 8 down to 1 real tokens; of a language model, labels at the real ones."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for index, real in enumerate(REAL):
        words = torch.randint(1, VOCABULARY, (real,), generator=generator).tolist()
        row = {
            "input_ids": words + [0] * (LENGTH - real),
            "attention_mask": [1] * real + [0] * (LENGTH - real),
        }
        made.append({**row, "labels": words + [-100] * (LENGTH - real) if causal else index % 3})
    return made


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config)
    made: nn.Module = model.eval()
    return made
