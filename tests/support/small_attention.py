"""A plain module with one attention and one feed-forward block, small enough to be captured in a moment."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx

WIDTH, WIDER, WORDS = 160, 200, 64  # no group of 64 divides either


class SmallAttention(nn.Module):
    """Word ids, ``(batch, length)``, to five scores."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, WIDER), nn.Linear(WIDER, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.words(ids)
        scores = self.query(hidden) @ self.key(hidden).transpose(1, 2) / WIDTH**0.5
        hidden = hidden + self.out(scores.softmax(-1) @ self.value(hidden))
        hidden = self.norm(hidden + self.down(nn.functional.gelu(self.up(hidden))))
        scored: Tensor = self.head(hidden.mean(1))
        return scored


def example() -> dict[str, Tensor]:
    """Return two rows of seven words."""
    return {"ids": torch.randint(0, WORDS, (2, 7), generator=torch.Generator().manual_seed(1))}


def small_attention() -> GraphModule:
    """Return a captured graph, in evaluation."""
    torch.manual_seed(0)
    return ti_fx.capture(SmallAttention(), example()).eval()
