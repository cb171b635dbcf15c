"""What becomes ONNX's own nodes before a graph is exported, and what is nearly the same and must not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.errors import ExportError
from ti_fx.ir.edit import aten_name
from ti_fx.passes.lower import operators
from ti_fx.passes.lower.complex_pairs import write_pairs
from ti_fx.passes.lower.fusion import FUSED_OPSET, fuse
from ti_fx.passes.lower.lowering import lower
from ti_fx.passes.lower.numbers import write_numbers

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
    own = (operators.rms_norm, operators.rotary, operators.attention, operators.attention_with_cache)
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
    (node,) = (node for node in gm.graph.nodes if node.target is operators.attention_with_cache)
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


class TwoReaders(Block):
    """A second block that attends to the keys and values of the first, as some models' later layers do."""

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor, past: Tensor) -> dict[str, Tensor]:
        found = super().forward(x, angles, mask, past)
        query = self.query(x).unflatten(-1, (-1, SIZE)).transpose(1, 2)
        keys, values = (found[name].expand(-1, HEADS, -1, -1) for name in ("keys", "values"))
        weights = (query @ keys.transpose(2, 3) * SIZE**-0.5 + mask).softmax(-1)
        return {**found, "second": (weights @ values).transpose(1, 2).flatten(2)}


def test_a_cache_belongs_to_one_of_the_blocks_that_read_it() -> None:
    torch.manual_seed(0)
    gm = ti_fx.capture(TwoReaders().train(False), example())
    fuse(gm.graph)
    gm.graph.lint()
    found = Counter(node.target for node in gm.graph.nodes)
    assert (found[operators.attention_with_cache], found[operators.attention]) == (1, 1)
    output: Any = gm.graph.output_node().args[0]
    (block,) = (node for node in gm.graph.nodes if node.target is operators.attention_with_cache)
    assert output["keys"].args == (block, 1)
    assert output["values"].args == (block, 2)


class Rotated(nn.Module):
    """Rotary positions as DeepSeek-V2 and Llama 4 write them, and a number that transformers asks erfinv of."""

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        table = torch.polar(torch.ones_like(angles), angles) * 1.5
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * table.unsqueeze(1)
        kept = torch.tensor(0.95)
        return torch.view_as_real(pairs).flatten(3) * torch.erfinv(2 * kept - 1)


def test_complex_numbers_and_erfinv_are_written_without_either() -> None:
    given = {"x": torch.randn(2, 3, 5, SIZE), "angles": torch.randn(2, 5, SIZE // 2)}
    gm = ti_fx.capture(Rotated(), given)
    expected = gm(**given)
    write_pairs(gm.graph)
    write_numbers(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    assert not {"polar", "view_as_complex", "view_as_real", "erfinv"} & {aten_name(n) for n in gm.graph.nodes}
    torch.testing.assert_close(gm(**given), expected)


def test_complex_numbers_without_a_rule_are_refused() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(x).conj().resolve_conj() + 1)

    gm = ti_fx.capture(Turned(), {"x": torch.randn(3, 4, 2)})
    with pytest.raises(ExportError, match="computes with complex numbers, which ONNX lacks"):
        write_pairs(gm.graph)


def test_a_size_that_can_be_only_one_is_written_as_a_number() -> None:
    class Sliced(nn.Module):
        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return table[max(0, 1 - 2 * x.shape[1]) :] + x.sum()

    gm = ti_fx.capture(Sliced(), {"x": torch.randn(2, 3), "table": torch.randn(4, 5)}, dynamic="all")
    lowered = lower(gm, FUSED_OPSET)
    assert not [node for node in lowered.graph.nodes if node.target is torch.sym_max]
