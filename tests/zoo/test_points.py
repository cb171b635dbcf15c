"""Context and output of a site against the original module: a known tensor changes both alike, at no other node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ti_fx
from ti_fx.errors import CoverageError
from ti_fx.example_inputs.makers import run
from ti_fx.find.attention import find_attention
from ti_fx.passes import DecomposeAttention
from ti_fx.zoo import build
from ti_fx.zoo import chain as chains
from ti_fx.zoo.chain import Outcome, run_chain
from ti_fx.zoo.count import attention_calls
from ti_fx.zoo.points import replacements


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "albert"))]
)
def test_known_contexts_and_outputs_change_graph_and_model_alike(name: str, tmp_path: Path) -> None:
    outcome = run_chain(name, lambda: build(name), tmp_path, until="sites")
    assert outcome.refused is None
    for point in ("context", "output"):
        assert outcome.numbers[f"replaced {point} sites"] == outcome.blocks
        assert outcome.numbers[f"replaced {point}"] < 1e-6


@pytest.mark.parametrize("point", [pytest.param("context", marks=pytest.mark.slow), "output"])
def test_a_site_at_another_node_is_found(point: str, tmp_path: Path) -> None:
    chain = chains.Chain(lambda: build("gpt2"), tmp_path, Outcome("gpt2"))
    for stage in ("build", "count", "capture"):
        getattr(chain, stage)()
    first, second = find_attention(chain.gm)
    moved: dict[str, Any] = {point: second.at(point)}
    with pytest.raises(
        CoverageError, match=f"a known {point} at .* changes the graph and the model differently"
    ):
        chain.check_points([replace(first, **moved), second])


class Gated(nn.Module):
    """Attention with a gate before its projection, and one whose projection is no module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 96), nn.Linear(32, 96)
        self.gate, self.output = nn.Linear(32, 32), nn.Linear(32, 32)
        self.weight = nn.Parameter(torch.randn(32, 32))

    def attend(self, packed: Tensor) -> Tensor:
        query, key, value = packed.chunk(3, -1)
        return (query @ key.transpose(-1, -2) / 6).softmax(-1) @ value

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.output(self.attend(self.first(hidden)) * self.gate(hidden).sigmoid())
        return hidden + self.attend(self.second(hidden)) @ self.weight


def test_a_gated_context_and_a_weight_without_a_module_are_left_out() -> None:
    model, example = Gated().eval(), {"hidden": torch.randn(2, 5, 32)}
    gm = ti_fx.capture(model, example)
    ti_fx.Pipeline(DecomposeAttention())(gm)
    calls = attention_calls(model, example)
    assert [call.projection for call in calls] == ["output", ""]
    found = replacements(find_attention(gm), calls, model, lambda: run(model, example))
    assert [(change.point, change.module) for change in found] == [("output", model.output)]
