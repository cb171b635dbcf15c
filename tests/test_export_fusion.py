"""What becomes ONNX's own nodes before a graph is exported, and what is nearly the same and must not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.export import ops
from ti_fx.export.fusion import fuse
from ti_fx.graph import aten_name

SIZE, HEADS = 8, 2


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


def example() -> dict[str, Tensor]:
    return {
        "x": torch.randn(2, 3, HEADS * SIZE),
        "angles": torch.randn(2, 3, SIZE // 2),
        "mask": torch.randn(2, 1, 3, 7),
        "past": torch.randn(2, 1, 4, SIZE),
    }


def fused(**spoilt: bool) -> tuple[GraphModule, Counter[Any]]:
    torch.manual_seed(0)
    block: nn.Module = Block(**spoilt)
    gm = ti_fx.capture(block.train(False), example())
    fuse(gm.graph)
    gm.graph.lint()
    own = (ops.rms_norm, ops.rotary, ops.attention, ops.attention_with_cache)
    return gm, Counter(node.target.__name__ for node in gm.graph.nodes if node.target in own)


def test_a_block_is_four_nodes_beside_its_layers() -> None:
    gm, found = fused()
    assert found == {"rms_norm": 1, "rotary": 2, "attention_with_cache": 1}
    names = Counter(name for node in gm.graph.nodes if (name := aten_name(node)))
    assert names["linear"] == 3
    # the angles are doubled, and the halves of their cosines and sines taken again
    assert set(names) <= {"linear", "cat", "cos", "sin", "slice", "clamp", "unflatten", "transpose"}
    assert names["cat"] == 2


def test_heads_stay_merged_where_all_operands_have_them_so() -> None:
    gm, _ = fused()
    (node,) = (node for node in gm.graph.nodes if node.target is ops.attention_with_cache)
    query, key, value, *_, heads, shared, past_key, past_value = node.args
    assert [part.meta["val"].dim() for part in (query, key, value)] == [3, 3, 3]
    assert (heads, shared) == (HEADS, 1)
    assert past_key is past_value


@pytest.mark.parametrize(
    ("spoilt", "lost"),
    [
        ("power", {"rms_norm": 1}),
        ("sign", {"rotary": 2}),
        ("halves", {"rotary": 2}),
        ("cap", {"attention_with_cache": 1}),
        ("map", {"attention_with_cache": 1}),
    ],
)
def test_what_only_looks_like_it_is_left_as_it_is(spoilt: str, lost: dict[str, int]) -> None:
    whole = Counter({"rms_norm": 1, "rotary": 2, "attention_with_cache": 1})
    _, found = fused(**{spoilt: True})
    assert found == whole - Counter(lost)
