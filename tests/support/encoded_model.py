"""A tiny model with every kind of weight that an encoding stores, prepared and packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.passes import Pack, QuantizeActivations, Strip, Ternarize

ROWS, WIDTH, INNER = 1100, 160, 256  # a width of one whole block of 128 and a part of one


class Model(nn.Module):
    """A table, layers of both orientations with large biases, and a head tied to the table."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(ROWS, width)
        self.first, self.second = nn.Linear(width, INNER), nn.Linear(INNER, width, bias=False)
        self.transposed = nn.Parameter(
            torch.randn(width, width) * 0.1
        )  # (inputs, outputs), as GPT-2 stores it
        self.offset = nn.Parameter(torch.randn(width) * 3)
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.first.bias, std=2.0)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        hidden = self.table(ids)
        hidden = hidden + self.second(nn.functional.gelu(self.first(hidden)))
        size = hidden.shape
        hidden = torch.addmm(self.offset, hidden.reshape(-1, size[-1]), self.transposed).view(size)
        return {"logits": nn.functional.linear(self.norm(hidden), self.table.weight)}


def example(batch: int = 3, length: int = 5) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, ROWS, (batch, length), generator=torch.Generator().manual_seed(1))}


def prepared(activations: QuantizeActivations, model: nn.Module | None = None) -> GraphModule:
    gm = ti_fx.capture(model or Model(), example())
    ti_fx.Pipeline(Ternarize(head=True), activations)(gm)
    return gm


def packed(activations: QuantizeActivations, model: nn.Module | None = None) -> GraphModule:
    gm = prepared(activations, model)
    ti_fx.Pipeline(Strip(), Pack())(gm)
    return gm
