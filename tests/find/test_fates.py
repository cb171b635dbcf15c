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


class Summed(nn.Module):
    """Rows of several tables are added up; ``head`` may share one."""

    def __init__(self, tied: str | None = None, **rows: int) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.Embedding(count, 8) for name, count in rows.items()})
        self.first = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4 if tied is None else rows[tied])
        if tied is not None:
            self.head.weight = self.tables[tied].weight  # type: ignore[assignment]

    def forward(self, ids: Tensor, places: Tensor, kinds: Tensor) -> Tensor:
        given = {"ids": ids, "places": places, "kinds": kinds}
        total = sum(table(given[name]) for name, table in self.tables.items())
        found: Tensor = self.head(self.first(total))
        return found


class Boxes(nn.Module):
    """Words, and around each a box of two corners."""

    def __init__(self) -> None:
        super().__init__()
        self.ids, self.across, self.down = (nn.Embedding(rows, 8) for rows in (1100, 1024, 1024))
        self.first, self.head = nn.Linear(24, 8), nn.Linear(8, 2)

    def forward(self, ids: Tensor, boxes: Tensor) -> Tensor:
        left, top, right, bottom = (boxes[..., index] for index in range(4))
        around = torch.cat((self.across(left) + self.across(right), self.down(top) + self.down(bottom)), -1)
        found: Tensor = self.head(self.first(torch.cat((self.ids(ids), around), -1)))
        return found


class Codes(nn.Module):
    """Tokens of three codes each, and two texts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.ModuleList(nn.Embedding(1100, 8) for _ in range(3))
        self.texts = nn.Embedding(1200, 8)
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, codes: Tensor, pairs: Tensor) -> Tensor:
        tokens = sum(table(codes[..., index]) for index, table in enumerate(self.codes))
        texts = self.first(self.texts(pairs[:, 0])) * self.first(self.texts(pairs[:, 1]))
        found: Tensor = self.head(self.first(tokens) + texts)
        return found


IDS = torch.randint(0, 1000, (2, 6), generator=torch.Generator().manual_seed(0))
PLACES = torch.arange(6).expand(2, 6).contiguous()
PADDED = torch.tensor([[2, 3, 4, 5, 1, 1], [2, 3, 1, 1, 1, 1]])
KINDS = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)


def words(model: nn.Module, example: dict[str, Tensor]) -> dict[str, str]:
    """Return why each table is ternary, or is not."""
    fates = Ternarize().fates(ti_fx.capture(model, example)).items()
    return {
        str(node.target): fate.granularity or fate.reason
        for node, fate in fates
        if str(node.target).startswith(("tables", "ids", "across", "down", "codes", "texts"))
    }


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Summed(ids=1100, places=2048, kinds=2), (IDS, PLACES, KINDS)),  # the larger table, and not of words
        (Summed(ids=1100, places=1024), (IDS, PLACES.flip(0) * 0, KINDS)),  # nothing shows the positions
        (Summed(ids=1100, places=2048, tied="ids"), (PLACES, IDS, KINDS)),  # ids that look like positions
        (
            Summed(ids=1100, places=2048, kinds=2),
            (IDS, torch.tensor([[0, 1, 2, 3, 1, 1]] * 2), KINDS),
        ),  # padding
    ],
    ids=["count on", "rows", "tied", "padded"],
)
def test_of_tables_that_are_added_up_one_is_of_words(
    model: nn.Module, example: tuple[Tensor, Tensor, Tensor]
) -> None:
    found = words(model, dict(zip(("ids", "places", "kinds"), example, strict=True)))
    assert found["tables.ids.weight"] == "row"
    assert (
        found["tables.places.weight"]
        == "positions or kinds: its rows are added to those of the word embedding tables.ids.weight"
    )


def test_ids_that_count_on_are_words_where_only_kinds_are_beside() -> None:
    example = {"ids": PLACES, "places": PLACES, "kinds": KINDS}
    assert words(Summed(ids=1100, kinds=2), example)["tables.ids.weight"] == "row"


def test_coordinates_are_no_words() -> None:
    boxes = torch.randint(0, 1000, (2, 6, 4), generator=torch.Generator().manual_seed(1))
    found = words(Boxes(), {"ids": IDS, "boxes": boxes})
    why = "coordinates: several numbers of boxes look it up"
    assert found == {"ids.weight": "row", "across.weight": why, "down.weight": why}


def test_codes_and_pairs_of_texts_are_words() -> None:
    example = {"codes": torch.stack([IDS] * 3, -1), "pairs": torch.stack([IDS, IDS.flip(0)], 1)}
    assert set(words(Codes(), example).values()) == {"row"}
