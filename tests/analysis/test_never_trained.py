"""What never trains is what autograd gives no gradient to; a trainer refuses it before the first step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, PlainBlock, Tiny, seeded, text_example
from tiny_training import cross_entropy, trainer
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx import Phase, Recipe
from ti_fx.analysis import untrained
from ti_fx.errors import InputError, PreconditionError
from ti_fx.passes import Distill, DuplicateTeacher, Intervene, QuantizeActivations, Ternarize

NO_LOGITS = Recipe("no logits", distill=Distill(logits=0.0))
POOLER = "bert.pooler.dense.weight"


class Pooled(nn.Module):
    """A block, and a head of two layers; ``between`` says what lies between the block and the head."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.words = nn.Embedding(VOCABULARY, 16)
        self.block = PlainBlock(16, 2, 0.0)
        self.dense = nn.Linear(16, 16)
        self.classify = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        mask = attention_mask.bool()[:, None, None, :]
        x = self.block(self.words(input_ids), mask)
        return {"logits": self.classify(self.between(torch.tanh(self.dense(self.between(x[:, 0])))))}


def detached(value: Tensor) -> Tensor:
    return value.detach()


def straight_through(value: Tensor) -> Tensor:
    return value + (torch.round(value) - value).detach()


def written(value: Tensor) -> Tensor:
    """The gradient passes along what is written in place."""
    made = torch.zeros_like(value)
    made[:, :8] = value[:, :8]
    made[:, 8:].copy_(value[:, 8:])
    return made


def signs(value: Tensor) -> Tensor:
    return (value > 0).float() + torch.round(value)


def without_gradient(gm: GraphModule, example: dict[str, Tensor]) -> set[str]:
    """The student's Parameters that a step leaves as they are, by autograd: no gradient, or zeros alone."""
    gm.train()
    gm.zero_grad()
    gm(**example)["loss"].backward()
    named = [(name, value) for name, value in gm.named_parameters() if not name.startswith("teacher.")]
    found = {name for name, value in named if value.grad is None or not value.grad.any()}
    gm.zero_grad()
    return found


@pytest.mark.parametrize("between", [detached, straight_through, written, signs])
def test_the_table_is_what_autograd_says(between: Callable[[Tensor], Tensor]) -> None:
    gm = ti_fx.capture(seeded(lambda: Pooled(between)), text_example())
    report = Recipe("one", distill=Distill(layer_outputs=0.0)).prepare(gm)
    found = {row.name for row in report.untrained}
    assert found == without_gradient(gm, text_example())
    assert found == {row.name for row in untrained(gm)}
    passes = between in (straight_through, written)
    assert ("dense.weight" in found) is not passes
    assert ("never trained: dense.weight (ternary, read by %linear_" in str(report)) is not passes


@pytest.mark.parametrize("at", [None, "map", "context", "output"])
def test_of_a_graph_with_an_intervention(prepared_bert: GraphModule, bert: Tiny, at: Any) -> None:
    gm = ti_fx.fork(prepared_bert)
    ti_fx.Pipeline(Intervene(at))(gm)
    found = {row.name for row in untrained(gm)}
    assert found == without_gradient(gm, bert.example)
    assert bool(found) is (at in ("context", "output"))


def test_a_recipe_trains_what_one_of_its_phases_does(bert: Tiny) -> None:
    distill = Distill(scores=0.0, layer_outputs=0.0, attention_outputs=0.0)
    left = {}
    for points in (("output",), ("output", "map"), ("output", None)):
        phases = tuple(Phase(str(point), Intervene(point), 2) for point in points)
        gm = bert.fork()
        rows = Recipe("phases", distill=distill, schedule=phases).prepare(gm).untrained
        left[points] = {row.name for row in rows}
        assert all(row.cause == "intervened" for row in rows)
    attention = "bert.encoder.layer.0.attention."
    assert left["output",] > left["output", "map"] > left["output", None] == set()
    assert attention + "self.query.weight" in left["output", "map"]
    assert attention + "output.dense.weight" not in left["output", "map"]


def test_a_graph_without_losses_is_refused(bert: Tiny) -> None:
    with pytest.raises(PreconditionError, match="run distill first"):
        untrained(bert.fork())


def test_the_table_of_passes_by_hand(bert: Tiny) -> None:
    passes = (DuplicateTeacher(), Ternarize(), QuantizeActivations(), Distill(logits=0.0))
    report = ti_fx.Pipeline(*passes)(bert.fork())
    row = next(row for row in report.untrained if row.name == POOLER)
    assert (row.is_ternary, row.cause) == (True, "no loss")
    assert "the output 'logits', which no loss reads" in str(row)


def test_a_trainer_refuses_what_no_loss_reaches(bert: Tiny, tmp_path: Path) -> None:
    gm = bert.fork()
    before = ti_fx.dump(gm)
    with pytest.raises(InputError) as caught:
        trainer(tmp_path, NO_LOGITS, model=gm)
    assert ti_fx.dump(gm) == before  # so that the next recipe can be tried
    message = str(caught.value)
    assert message.startswith(
        f"{POOLER} would become ternary and never train: it leads to the output 'logits'"
    )
    assert f"Ternarize(skip=({POOLER!r},))" in message
    assert "\n" not in message
    skip = Recipe("skip", distill=Distill(logits=0.0), ternarize=Ternarize(skip=(POOLER,)))
    trainer(tmp_path, skip, model=gm)
    task = Recipe("task", distill=Distill(logits=0.0, task=1.0))
    trainer(tmp_path, task, model=bert.fork(), compute_loss_func=cross_entropy)


@pytest.fixture
def frozen(bert: Tiny) -> Iterator[Callable[[str], GraphModule]]:
    """Freeze the weights whose name begins so, and return a graph of the model; they train again after the test."""

    def freeze(prefix: str) -> GraphModule:
        for name, value in bert.graph.named_parameters():
            value.requires_grad_(not name.startswith(prefix))
        return bert.fork()

    yield freeze
    bert.graph.requires_grad_(True)


def test_a_frozen_weight_is_named(
    frozen: Callable[[str], GraphModule], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "bert.embeddings.word_embeddings.weight"
    with caplog.at_level(logging.WARNING, logger="ti_fx"):
        made = trainer(tmp_path, model=frozen(name))
    assert f"{name}: ternary, and frozen" in caplog.text
    assert [row.name for row in untrained(made.model.prepared())] == [name]


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_where_no_ternary_weight_trains(
    frozen: Callable[[str], GraphModule], prefix: str, tmp_path: Path
) -> None:
    """With ``bert.`` the classifier alone would train."""
    with pytest.raises(InputError, match=r"all 14 ternary weights are frozen, .*requires_grad_\(True\)"):
        trainer(tmp_path, model=frozen(prefix))
