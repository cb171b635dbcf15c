"""Eigenvalues of the Hessian against explicit ones in float64, and the loss around the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import PlainTransformer, seeded, text_example, tokens
from torch import Tensor
from torch.func import functional_call
from torch.fx import GraphModule

import ti_fx
from ti_fx import Pipeline
from ti_fx.analysis import (
    HessianProducts,
    eigenvalues_by_example,
    loss_surface,
    spectrum,
    top_eigenvalues,
)
from ti_fx.errors import InputError
from ti_fx.passes import DecomposeAttention, Distill, DuplicateTeacher, Intervene, Ternarize

calculus: Any = torch.autograd.functional
CHOSEN = ["blocks.0.q.weight", "blocks.0.o.weight", "blocks.0.feed_forward.0.weight", "classify.weight"]
BATCH = {"tokens": tokens(), "keep": text_example()["attention_mask"]}


def made(ternary: bool) -> GraphModule:
    gm = ti_fx.capture(seeded(lambda: PlainTransformer(layers=1, size=4, heads=2)).double(), BATCH)
    Pipeline(DecomposeAttention(), DuplicateTeacher(), *([Ternarize()] if ternary else []))(gm)
    Pipeline(Distill())(gm)
    if not ternary:  # the student is its teacher there: move it, so that the losses are not all 0
        for name in CHOSEN:
            gm.get_parameter(name).data.add_(0.1)
    return gm


@pytest.fixture(scope="module")
def ternary() -> GraphModule:
    return made(True)


def at(gm: GraphModule) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return the loss as a function of the chosen Parameters, flat, and where they are."""
    own = [gm.get_parameter(name).detach() for name in CHOSEN]

    def loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [one.numel() for one in own])
        values = {name: part.view_as(one) for name, part, one in zip(CHOSEN, parts, own, strict=True)}
        found: Tensor = functional_call(gm.eval(), values, (), BATCH)["loss"]
        return found

    return loss, torch.cat([one.reshape(-1) for one in own])


def test_products_are_differences_of_gradients() -> None:
    gm = made(False)
    loss, here = at(gm)
    products = HessianProducts(gm, BATCH, parameters=CHOSEN)
    direction = torch.randn(products.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ahead, behind = (
        calculus.vjp(loss, here + sign * 1e-5 * direction, torch.ones((), dtype=torch.float64))[1]
        for sign in (1, -1)
    )
    torch.testing.assert_close(products(direction), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-8)


def test_eigenvalues_are_those_of_the_explicit_hessian(ternary: GraphModule) -> None:
    loss, here = at(ternary)
    explicit = calculus.hessian(loss, here)
    values = torch.linalg.eigvalsh((explicit + explicit.T) / 2)
    products = HessianProducts(ternary, BATCH, parameters=CHOSEN)
    expected = sorted(values.tolist(), key=abs, reverse=True)
    assert top_eigenvalues(products, 3, steps=products.size) == pytest.approx(expected[:3], rel=1e-6)
    assert top_eigenvalues(products, 1) == pytest.approx(expected[:1], rel=1e-4)
    found = spectrum(products, steps=products.size, draws=32)
    assert sum(found.weights) == pytest.approx(1)
    assert found.parameters == len(here)
    # the spread of the estimate over 32 draws of signs: twice the norm beside the diagonal
    beside = (explicit - torch.diag(explicit.diagonal())).norm()
    assert abs(found.trace - float(values.sum())) <= 4 * float(beside) * (2 / 32) ** 0.5


def test_every_example_has_its_own(ternary: GraphModule) -> None:
    found = eigenvalues_by_example(ternary, BATCH, parameters=["classify.weight"])
    assert len(found) == len(BATCH["tokens"])
    row = {name: value[1:2] for name, value in BATCH.items()}
    assert (
        found[1]
        == top_eigenvalues(HessianProducts(ternary, row, parameters=["classify.weight"]), steps=20)[0]
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (["nothing.weight"], "no parameter 'nothing.weight'"),
        (["teacher.classify.weight"], "none of these Parameters is trained"),
    ],
)
def test_what_has_no_hessian_is_refused(parameters: list[str], message: str, ternary: GraphModule) -> None:
    names = dict(ternary.named_parameters())
    wanted = [next((one for one in names if one.startswith("teacher.") and one.endswith("classify.weight")), name)
              if name.startswith("teacher") else name for name in parameters]  # fmt: skip
    with pytest.raises(InputError, match=message) as caught:
        HessianProducts(ternary, BATCH, parameters=wanted)
    assert "\n" not in str(caught.value)


def test_more_eigenvalues_than_there_are(ternary: GraphModule) -> None:
    products = HessianProducts(ternary, BATCH, parameters=["classify.weight"])
    with pytest.raises(InputError, match="count is 50; give 1 to 12"):
        top_eigenvalues(products, 50)


def test_the_surface_is_the_loss_at_moved_weights(ternary: GraphModule) -> None:
    gm = ti_fx.fork(ternary)
    Pipeline(Intervene(at="map"))(gm)
    before = {name: value.detach().clone() for name, value in gm.named_parameters()}
    found = loss_surface(gm, [BATCH], steps=3, span=0.5)
    assert all(torch.equal(value, before[name]) for name, value in gm.named_parameters())
    assert found.offsets == (-0.5, 0.0, 0.5)
    with torch.no_grad():
        here = float(gm.eval()(**BATCH)["loss"])
    assert found.losses[1][1] == pytest.approx(here, rel=1e-12)
    assert len({value for row in found.losses for value in row}) == 9
    with pytest.raises(InputError, match="steps is 4; give an odd number"):
        loss_surface(gm, [BATCH], steps=4)
    with pytest.raises(InputError, match="no batch"):
        loss_surface(gm, [])
