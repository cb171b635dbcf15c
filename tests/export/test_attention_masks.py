"""Attention of one's own becomes ONNX's node with any mask that means the same there; the report says which do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.export import Runtime, lower, to_onnx
from ti_fx.ir.facts import facts
from ti_fx.passes import Pack, Ternarize

HEADS, SIZE = 2, 8
Hide = Callable[[Tensor, Tensor], Tensor]


def _low(keep: Tensor) -> Tensor:
    return (1.0 - keep[:, None, None, :].float()) * -1e4


def _later(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)


FUSED: dict[str, Hide] = {
    "one row for all tokens": lambda scores, keep: scores + _low(keep),
    "two dimensions": lambda scores, keep: scores + torch.full(scores.shape[-2:], -1e9).triu(1),
    "two masks": lambda scores, keep: scores + torch.full(scores.shape[-2:], -1e9).triu(1) + _low(keep),
    "filled in": lambda scores, keep: scores.masked_fill(keep[:, None, None, :] == 0, -1e9),
    "filled in after another": lambda scores, keep: (scores + _low(keep)).masked_fill(_later(scores), -1e9),
    "chosen": lambda scores, keep: torch.where(keep[:, None, None, :].bool(), scores, -1e9),
}
LEFT: dict[str, tuple[Hide, str]] = {
    "a number that is not far below": (
        lambda scores, keep: scores.masked_fill(keep[:, None, None, :] == 0, -100.0),
        "its scores are filled with -100, which is not far below any score",
    ),
    "infinity": (
        lambda scores, keep: scores.masked_fill(keep[:, None, None, :] == 0, -math.inf),
        "its scores are filled with -inf, of which a row that is masked whole gives NaN",
    ),
    "capped": (
        lambda scores, keep: scores.tanh() + _low(keep),
        "its scores are made by tanh, not by a product and masks",
    ),
}


class Block(nn.Module):
    """Attention with a residual sum and a norm."""

    def __init__(self, hide: Hide) -> None:
        super().__init__()
        self.hide = hide
        width = HEADS * SIZE
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            layer(x).view(batch, length, HEADS, SIZE).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = self.hide(query @ key.transpose(-1, -2) / math.sqrt(SIZE), keep)
        context = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, width)
        found: Tensor = self.norm(x + self.output(context))
        return found


class Blocks(nn.Module):
    """A block after the other, each with a mask of its own kind."""

    def __init__(self, hides: Iterable[Hide]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, hides))
        self.head = nn.Linear(HEADS * SIZE, 3)

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        streams = [x]
        for block in self.blocks:
            streams.append(block(streams[-1], keep))
        return {f"stream_{index}": stream for index, stream in enumerate(streams[1:])} | {
            "logits": self.head(streams[-1])
        }


def example() -> dict[str, Tensor]:
    keep = torch.ones(3, 7, dtype=torch.long)
    keep[1, 4:] = keep[2, 1:] = 0
    return {"x": torch.randn(3, 7, HEADS * SIZE, generator=torch.Generator().manual_seed(0)), "keep": keep}


def student(hides: Iterable[Hide]) -> GraphModule:
    torch.manual_seed(0)
    gm = ti_fx.capture(Blocks(hides).eval(), example())
    ti_fx.Pipeline(Ternarize(), Pack())(gm)
    return gm


def fused(path: Path) -> int:
    return sum(node.op_type == "Attention" for node in onnx.load(path).graph.node)


def test_a_mask_of_ones_own_is_fused_and_hides_the_same(tmp_path: Path) -> None:
    gm = student(FUSED.values())
    report = to_onnx(gm, tmp_path / "blocks.onnx", example())
    count = len(FUSED)
    assert (report.attention_blocks, dict(report.unfused), fused(report.path)) == (count, {}, count)
    assert f"{count} of {count} attention blocks became ONNX's Attention" in str(report)
    for length in (4, 9):
        keep = torch.ones(2, length, dtype=torch.long)
        keep[0] = 0  # a row of padding alone
        keep[1, 2:] = 0
        given = {"x": torch.randn(2, length, HEADS * SIZE), "keep": keep}
        expected = gm(**given)
        for name, found in Runtime(report.path).tensors(given).items():
            torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-4, msg=f"{name} of {length}")


@pytest.mark.slow
def test_the_report_says_why_blocks_are_not_fused(tmp_path: Path) -> None:
    report = to_onnx(student(hide for hide, _ in LEFT.values()), tmp_path / "blocks.onnx", example())
    assert fused(report.path) == 0
    assert f"0 of {len(LEFT)} attention blocks became ONNX's Attention" in str(report)
    for layer, (_, reason) in enumerate(LEFT.values()):
        assert f"not that of stack 0, layer {layer} (self): {reason}" in str(report)


def test_an_opset_without_the_node_is_a_reason() -> None:
    lowered = lower(student([FUSED["one row for all tokens"]]), 21)
    assert list(facts(lowered).unfused.values()) == ["opset 21 is below 25"]
