"""What becomes ONNX's own nodes before a graph is exported, and what is nearly the same and must not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from lowering_models import HEADS, SIZE, Block, as_packed, block_example
from torch import Tensor
from torch.fx import GraphModule

from ti_fx.ir.edit import aten_name
from ti_fx.ir.facts import record_facts
from ti_fx.ir.pipeline import Pipeline
from ti_fx.passes.lower import DropIdentities, FuseAttention, FuseRmsNorms, FuseRotary, operators

FUSE = Pipeline(DropIdentities(), FuseRmsNorms(), FuseRotary(), FuseAttention())
OWN = (operators.rms_norm, operators.rotary, operators.attention, operators.attention_with_cache)


def fused(block: Block) -> tuple[GraphModule, Counter[Any]]:
    gm = as_packed(block, block_example())
    FUSE(gm)
    return gm, Counter(node.target.__name__ for node in gm.graph.nodes if node.target in OWN)


def test_a_block_is_four_nodes_beside_its_layers() -> None:
    gm, found = fused(Block())
    assert found == {"rms_norm": 1, "rotary": 2, "attention_with_cache": 1}
    names = Counter(name for node in gm.graph.nodes if (name := aten_name(node)))
    assert names["linear"] == 3
    # the angles are doubled, and the halves of their cosines and sines taken again
    assert set(names) <= {"linear", "cat", "cos", "sin", "slice", "clamp", "unflatten", "transpose"}
    assert names["cat"] == 2


def test_below_opset_25_nothing_is_fused() -> None:
    gm = as_packed(Block(), block_example())
    record_facts(gm, opset=24)
    assert not FUSE(gm).changed


def test_heads_stay_merged_where_all_operands_have_them_so() -> None:
    gm, _ = fused(Block())
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
    _, found = fused(Block(**{spoilt: True}))
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
    gm, _ = fused(TwoReaders())
    found = Counter(node.target for node in gm.graph.nodes)
    assert (found[operators.attention_with_cache], found[operators.attention]) == (1, 1)
    output: Any = gm.graph.output_node().args[0]
    (block,) = (node for node in gm.graph.nodes if node.target is operators.attention_with_cache)
    assert output["keys"].args == (block, 1)
    assert output["values"].args == (block, 2)


def test_a_value_is_in_its_own_type_after_every_pass() -> None:
    gm, _ = fused(Block())
    assert all(
        node.meta["val"].dtype == torch.float32
        for node in gm.graph.nodes
        if node.target is operators.rms_norm
    )
