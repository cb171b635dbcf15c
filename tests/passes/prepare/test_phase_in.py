"""Weights that are phased in: both ends bit for bit, gradients, training, and what the student has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import Tiny, bert_model, text_example
from tiny_training import different, history, trainer, weights
from torch import Tensor
from torch.fx import GraphModule, Node

import ti_fx
from ti_fx import Recipe, numerics
from ti_fx.errors import PreconditionError, RecipeError, VerificationError
from ti_fx.ir.edit import tensor
from ti_fx.ir.phased import SHARE, is_phase_in, set_share
from ti_fx.passes import Distill, DuplicateTeacher, Pack, PhaseIn, QuantizeActivations, Strip, Ternarize


def graph(tiny: Tiny, *passes: Any) -> GraphModule:
    """The tiny model in evaluation with a teacher, losses and these passes; activations in full precision."""
    gm = tiny.fork()
    ti_fx.Pipeline(DuplicateTeacher(), *passes)(gm)
    gm.eval()
    return gm


def step(gm: GraphModule, example: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of the student's tensors."""
    loss = gm(**example)["loss"]
    named = {name: value for name, value in gm.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(loss, [*named.values()], allow_unused=True)
    return loss.detach(), {
        name: torch.zeros_like(named[name]) if one is None else one
        for name, one in zip(named, found, strict=True)
    }


@pytest.mark.parametrize(("share", "other"), [(1.0, (Ternarize(),)), (0.0, ())])
def test_both_ends_are_bit_equal(share: float, other: tuple[Any, ...], bert_layer: Tiny) -> None:
    gm = graph(bert_layer, Ternarize(), Distill(), PhaseIn())
    set_share(gm, share)
    loss, gradients = step(gm, bert_layer.example)
    wanted, expected = step(graph(bert_layer, *other, Distill()), bert_layer.example)
    assert torch.equal(loss, wanted)
    assert different(gradients, expected) == []


def test_between_the_ends_values_and_gradients_are_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(4, 6, generator=generator, dtype=torch.float64) * 2
    upstream = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    latent.requires_grad_(True)
    share = torch.tensor(0.3, dtype=torch.float64)
    found = numerics.phase_in(latent, numerics.ternary(latent, "row"), share)
    codes, scale = numerics.ternary_codes(latent, "row")
    with torch.no_grad():
        torch.testing.assert_close(found, latent + 0.3 * (codes * scale - latent), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(found, latent, upstream)
    inside = (latent.detach().abs() < numerics.CLIP).double()
    torch.testing.assert_close(gradient, upstream * (0.7 + 0.3 * inside), rtol=1e-12, atol=1e-12)


def test_it_runs_once_and_strip_takes_it_out(bert_layer: Tiny) -> None:
    plain, gm = (graph(bert_layer, Ternarize(), QuantizeActivations(), Distill()) for _ in range(2))
    names = set(gm.state_dict())
    ti_fx.Pipeline(PhaseIn())(gm)
    assert any(is_phase_in(node) for node in gm.graph.nodes)
    assert set(gm.state_dict()) == names
    assert not ti_fx.Pipeline(PhaseIn())(gm).changed
    assert str(ti_fx.Pass.parse("phase-in")) == "phase-in"
    for one in (plain, gm):
        ti_fx.Pipeline(Strip(), Pack())(one)
    assert ti_fx.dump(gm) == ti_fx.dump(plain)


def _read_beside(gm: GraphModule, node: Node) -> None:
    (reader,) = node.users
    quantised = node.args[1]
    assert isinstance(quantised, Node)
    reader.replace_input_with(node, quantised)


def _another_weight(gm: GraphModule, node: Node) -> None:
    other = next(one for one in gm.graph.nodes if is_phase_in(one) and one is not node)
    node.args = (other.args[0], *node.args[1:])


def _trained_share(gm: GraphModule, node: Node) -> None:
    tensor(gm, SHARE).requires_grad_(True)


@pytest.mark.parametrize("breaks", [_read_beside, _another_weight, _trained_share])
def test_verify_knows_it(breaks: Any, bert_layer: Tiny) -> None:
    gm = graph(bert_layer, Ternarize(), PhaseIn())
    ti_fx.verify(gm)
    breaks(gm, next(node for node in gm.graph.nodes if is_phase_in(node) and "query" in node.name))
    gm.recompile()
    with pytest.raises(VerificationError):
        ti_fx.verify(gm)


def test_what_does_not_fit_is_refused_in_one_line(bert_layer: Tiny) -> None:
    with pytest.raises(PreconditionError, match="phase-in needs weights that are quantised"):
        ti_fx.Pipeline(PhaseIn())(bert_layer.fork())
    gm = bert_layer.fork()
    with pytest.raises(VerificationError, match="strip takes out what is phased in"):
        ti_fx.Pipeline(Ternarize(), PhaseIn(), Pack())(gm)
    for values, says in (
        ({"phase_in": {"start": 0, "end": 1, "layers": [0]}}, "share of quantised weights has no layers"),
        ({"phase_in": "linear"}, r"schedule\[0\].phase_in holds 'linear'"),
        ({"phase_in": {"shap": "linear"}}, "did you mean 'shape'"),
    ):
        with pytest.raises(RecipeError, match=says) as caught:
            Recipe.from_dict({"name": "wrong", "schedule": [{"name": "a", **values}]})
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_share_follows_its_curve_and_training_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    made = trainer(tmp_path, "phase-in", model=bert_model(1), arguments_options=options, eval_dataset=None)
    made.train()
    assert [row.get("phase_in") for row in history(made)] == [0.0, 0.5, None, None]
    resumed = trainer(
        tmp_path / "on",
        "phase-in",
        model=bert_model(1),
        arguments_options={"max_steps": 4},
        eval_dataset=None,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert different(weights(made), weights(resumed)) == []
    assert not [name for name in made.model.state_dict() if "phase_in" in name]
    student = ti_fx.load(tmp_path / "checkpoint-4", bert_model(1))
    assert not [node for node in student.graph.nodes if is_phase_in(node)]
    assert student(**text_example()).logits.shape == (3, 3)
