"""Each stored tensor has a fate: what Ternarize selects, and a reason for what it leaves."""

from __future__ import annotations

import pytest
import torch
from models import Tiny
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import ti_fx
from ti_fx import numerics
from ti_fx.find.weights import heads, projections, table, word_embeddings
from ti_fx.ir.edit import tensor
from ti_fx.passes import Ternarize


class Everything(nn.Module):
    """One tensor of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(1100, 8)
        self.places = nn.Embedding(1100, 8)  # looked up with numbers that no input gives
        self.kinds = nn.Embedding(2, 8)
        self.added = nn.Parameter(torch.randn(1, 6, 8))
        self.norm = nn.LayerNorm(8)
        self.first = nn.Linear(8, 8)
        self.normed = weight_norm(nn.Linear(8, 8))
        self.over = nn.Conv1d(8, 8, 3, padding=1)
        self.experts = nn.Parameter(torch.randn(6, 8, 8))
        self.register_buffer("fixed", torch.randn(8, 8))
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])[None]
        x = self.norm(self.words(ids) + self.places(places) + self.kinds(ids * 0) + self.added)
        x = self.normed(self.first(x))
        x = self.over(x.transpose(1, 2)).transpose(1, 2) @ self.fixed
        x = x + torch.bmm(x.transpose(0, 1), self.experts).transpose(0, 1) * self.scale
        result: Tensor = self.head(x)
        return result


EXPECTED = {
    "words.weight": "word embedding",
    "places.weight": "table not indexed by an input of the graph",
    "kinds.weight": "table of 2 rows; a word embedding has 1024 or more",
    "added": "added to activations or put beside them, not multiplied",
    "norm.weight": "norm",
    "first.weight": "linear projection",
    "first.bias": "bias",
    "normed.parametrizations.weight.original0": "a weight is computed from it (weight norm)",
    "normed.parametrizations.weight.original1": "a weight is computed from it (weight norm)",
    "over.weight": "convolution, not a linear projection",
    "experts": "weights of 3 dimensions (experts, heads); a linear projection has 2",
    "fixed": "buffer, which is not trained",
    "scale": "vector: norm or scale",
    "head.weight": "head: no parametric operation follows it",
}


def test_each_kind_has_its_reason() -> None:
    torch.manual_seed(0)
    gm = ti_fx.capture(Everything(), {"ids": torch.randint(0, 1100, (3, 6))}, dynamic="batch")
    fates = {str(node.target): fate for node, fate in Ternarize().fates(gm).items()}
    assert {name: fates[name].reason for name in EXPECTED} == EXPECTED
    assert fates.keys() >= dict(gm.named_parameters()).keys()
    chosen = {name: fate.granularity for name, fate in fates.items() if fate.granularity is not None}
    assert chosen == {"words.weight": "row", "first.weight": "tensor"}


def test_options_are_reasons() -> None:
    gm = ti_fx.capture(Everything(), {"ids": torch.randint(0, 1100, (3, 6))}, dynamic="batch")

    def reason(name: str, **options: object) -> str:
        fates = Ternarize(**options).fates(gm)  # type: ignore[arg-type]
        (found,) = (fate.reason for node, fate in fates.items() if node.target == name)
        return found

    assert reason("first.weight", weights=None) == "weights=none"
    assert reason("words.weight", embeddings=None) == "embeddings=none"
    assert reason("first.weight", skip=("first",)) == "skip"
    assert reason("head.weight", head=True) == "linear projection"


@pytest.mark.parametrize("options", [{}, {"head": True}, {"min_rows": 1}, {"weights": "row"}], ids=str)
def test_what_is_selected_is_what_the_rules_say(tiny: Tiny, options: dict[str, object]) -> None:
    ternarize = Ternarize(**options)  # type: ignore[arg-type]
    gm = tiny.fork()
    kept = set() if ternarize.head else heads(gm)
    wanted = {table(node) for node in word_embeddings(gm, ternarize.min_rows)}
    wanted |= {
        source
        for node in projections(gm)
        if node not in kept
        for argument in node.all_input_nodes
        for source in (argument, *argument.all_input_nodes)
        if source.op == "get_attr" and tensor(gm, str(source.target)).dim() == 2
    }
    assert set(ternarize.select(gm)) == wanted
    ti_fx.Pipeline(ternarize)(gm)
    read = {node.all_input_nodes[0].target for node in gm.graph.nodes if node.target is numerics.ternary}
    assert read == {node.target for node in wanted}
    # the graph says the same of itself once it has run
    after = {node.target: fate for node, fate in ternarize.fates(gm).items()}
    assert after == {node.target: fate for node, fate in ternarize.fates(tiny.graph).items()}
