"""Small modules with what each lowering pass rewrites, and a graph that such passes take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.ir.facts import record_facts
from ti_fx.passes import Pack, QuantizeActivations, Ternarize

SIZE, HEADS = 8, 2
ROWS = 1100  # above Ternarize's min_rows


class Block(nn.Module):
    """A block of a decoder with every part that is fused, and switches that spoil one each."""

    def __init__(self, **spoilt: bool) -> None:
        super().__init__()
        self.spoilt = spoilt
        self.norm = nn.Parameter(torch.ones(HEADS * SIZE))
        self.query = nn.Linear(HEADS * SIZE, HEADS * SIZE)
        self.key, self.value = (nn.Linear(HEADS * SIZE, SIZE) for _ in range(2))

    def turned(self, x: Tensor) -> Tensor:
        half = SIZE // 2
        first, last = x[..., :half], x[..., half:]
        return torch.cat((last, first) if self.spoilt.get("sign") else (-last, first), -1)

    def rotated(self, x: Tensor, angles: Tensor) -> Tensor:
        both = torch.cat((angles, angles * 2 if self.spoilt.get("halves") else angles), -1)
        return x * both.cos().unsqueeze(1) + self.turned(x) * both.sin().unsqueeze(1)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor, past: Tensor) -> dict[str, Tensor]:
        square = x.pow(3 if self.spoilt.get("power") else 2)
        normed = self.norm * (x * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-6))
        query, key, value = (
            layer(normed).unflatten(-1, (-1, SIZE)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        query, key = self.rotated(query, angles), self.rotated(key, angles)
        keys, values = torch.cat((past, key), 2), torch.cat((past, value), 2)
        batch, _, total, _ = keys.shape
        wide_keys, wide_values = (
            part[:, :, None].expand(batch, 1, HEADS, total, SIZE).reshape(batch, HEADS, total, SIZE)
            for part in (keys, values)
        )
        scores = query @ wide_keys.transpose(2, 3) * SIZE**-0.5
        if self.spoilt.get("cap"):
            scores = scores.tanh()
        weights = (scores + mask).softmax(-1)
        context = (weights @ wide_values).transpose(1, 2).flatten(2)
        result = {"context": context, "keys": keys, "values": values}
        return {**result, "map": weights} if self.spoilt.get("map") else result


def block_example() -> dict[str, Tensor]:
    return {
        "x": torch.randn(2, 3, HEADS * SIZE),
        "angles": torch.randn(2, 3, SIZE // 2),
        "mask": torch.randn(2, 1, 3, 7),
        "past": torch.randn(2, 1, 4, SIZE),
    }


class Rotated(nn.Module):
    """Rotary positions as DeepSeek-V2 and Llama 4 write them, and a number that transformers asks erfinv of."""

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        table = torch.polar(torch.ones_like(angles), angles) * 1.5
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * table.unsqueeze(1)
        kept = torch.tensor(0.95)
        return torch.view_as_real(pairs).flatten(3) * torch.erfinv(2 * kept - 1)


def rotated_example() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, 5, SIZE), "angles": torch.randn(2, 5, SIZE // 2)}


class Small(nn.Module):
    """A word embedding, two linear layers that read one value, a residual sum before a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, SIZE)
        self.left, self.right, self.head = (nn.Linear(SIZE, SIZE) for _ in range(3))
        self.norm, self.dropout = nn.LayerNorm(SIZE), nn.Dropout(0.1)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.dropout(self.table(ids))
        return self.head(self.norm(found + self.left(found) * self.right(found)))  # type: ignore[no-any-return]


def packed_small(encoding: str = "int8-tensor", kept: Any = None) -> GraphModule:
    """Return the packed graph of :class:`Small`, in eval mode."""
    torch.manual_seed(0)
    gm = ti_fx.capture(Small(), small_example())
    ti_fx.Pipeline(Ternarize(), QuantizeActivations(encoding=encoding), Pack(kept=kept))(gm)
    return gm.eval()


def small_example() -> dict[str, Tensor]:
    return {"ids": torch.arange(6).view(2, 3)}


def as_packed(model: nn.Module, example: dict[str, Tensor], **options: Any) -> GraphModule:
    """Capture a model without ternary weights, and call the graph packed: passes that need none take it."""
    torch.manual_seed(0)
    gm = ti_fx.capture(model.eval(), example, **options)
    record_facts(gm, stage="packed")
    return gm


def small_source() -> tuple[nn.Module, dict[str, Tensor]]:
    """What ``ti-fx export lowering_models:small_source`` takes."""
    torch.manual_seed(0)
    return Small(), small_example()
