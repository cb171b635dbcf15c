"""Canonicalize: the ways to write a product or a softmax become one, and values stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.ir.edit import aten_name
from ti_fx.passes import Canonicalize


class Written(nn.Module):
    """A function of two inputs of shape (batch, length, 4, 6)."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


def inputs() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(2, 5, 4, 6, generator=random) for name in "ab"}


def captured(function: Callable[[Tensor, Tensor], Tensor]) -> GraphModule:
    """Capture (which canonicalises), and compare in double precision at another size."""
    gm = ti_fx.capture(Written(function), inputs())
    other = {name: torch.cat([value, value.flip(0)]).double()[:3] for name, value in inputs().items()}
    expected = function(other["a"], other["b"])
    single = gm(**{name: value.float() for name, value in other.items()})
    # float32 sums of at most 30 terms
    assert (single - expected).abs().max() <= 1e-5 * expected.abs().max()
    return gm


def names(gm: GraphModule) -> set[str]:
    return {aten_name(node) for node in gm.graph.nodes} - {""}


@pytest.mark.parametrize(
    "equation",
    [
        "bqhd,bkhd->bhqk",
        "bqhd,bkhd->bqkh",
        "bqhd,bkhd->bkhq",
        "bqhd,bkhe->bhqkde",  # no summed label: an outer product
        "...qd,...kd->...qk",
        "b...d,b...d->b...",
        "bqhd,bkhd->bq",  # k is summed in one factor alone, h and d in both
        "bqhd,bqhe->bqde",
        "bqhd, bkgd -> bhgqk",
    ],
)
def test_an_einsum_computes_the_same(equation: str) -> None:
    gm = captured(lambda a, b: torch.einsum(equation, a, b))
    outside = equation in ("bqhd,bkhe->bhqkde", "bqhd,bkhd->bq")
    assert ("einsum" in names(gm)) == outside
    assert ("matmul" in names(gm)) != outside


def test_a_broadcast_product_that_is_summed_is_a_matmul() -> None:
    gm = captured(lambda a, b: (a.transpose(1, 2).unsqueeze(3) * b.transpose(1, 2).unsqueeze(2)).sum(-1))
    assert "matmul" in names(gm)
    assert not names(gm) & {"mul", "sum"}


def test_a_weighted_mean_stays_as_it_is() -> None:
    gm = captured(lambda a, b: (a * b[..., :1]).sum(1))
    assert names(gm) >= {"mul", "sum"}
    assert "matmul" not in names(gm)


def shifted(a: Tensor, dim: int) -> Tensor:
    powers = torch.exp(a - a.amax(dim, keepdim=True))
    return powers / powers.sum(dim, keepdim=True)


def by_log(a: Tensor, dim: int) -> Tensor:
    return a.log_softmax(dim).exp()


def less_their_total(a: Tensor, dim: int) -> Tensor:
    return torch.exp(a - a.logsumexp(dim, keepdim=True))


def bare(a: Tensor, dim: int) -> Tensor:
    return a.exp() / a.exp().sum(dim, keepdim=True)


@pytest.mark.parametrize("dim", [-1, 2, 0])
@pytest.mark.parametrize("function", [shifted, by_log, less_their_total])
def test_a_softmax_written_by_hand_is_a_softmax(function: Callable[[Tensor, int], Tensor], dim: int) -> None:
    gm = captured(lambda a, b: function(a @ b.transpose(-1, -2), dim))
    assert "softmax" in names(gm)
    assert "exp" not in names(gm)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a.exp() / (1 + a.exp().sum(-1, keepdim=True)),
        lambda a, b: (powers := a.exp()) / powers.sum(-1, keepdim=True) + powers,
        lambda a, b: (powers := (a - b).exp()) / powers.sum(),
        lambda a, b: (powers := a.exp()) / powers.sum(1, keepdim=True).sum(2, keepdim=True),
        lambda a, b: (a - b.logsumexp(-1, keepdim=True)).exp(),
    ],
    ids=[
        "one more in the sum",
        "the powers have another reader",
        "no dimension kept",
        "a sum of sums",
        "another's",
    ],
)
def test_what_is_no_softmax_stays(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert "softmax" not in names(captured(function))


def test_what_is_taken_off_may_differ_along_the_dimension() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        powers = torch.exp(a - b)
        return powers / powers.sum(-1, keepdim=True)

    gm = captured(function)
    (softmax,) = (node for node in gm.graph.nodes if aten_name(node) == "softmax")
    assert aten_name(softmax.args[0]) == "sub"


def test_run_twice_it_changes_nothing() -> None:
    gm = captured(lambda a, b: torch.einsum("bqhd,bkhd->bhqk", a, b))
    assert not ti_fx.Pipeline(Canonicalize())(gm).changed


def test_golden(golden: Callable[[str, str], None]) -> None:
    gm = captured(lambda a, b: shifted(torch.einsum("bqhd,bkhd->bhqk", a, b), -1))
    golden("canonicalize", ti_fx.dump(gm))


def test_what_is_written_into_a_softmax_is_a_new_tensor() -> None:
    class Masked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
            result = scores.masked_fill(mask, -1e9).softmax(-1)
            result.masked_fill_(mask, 0)
            return result

    def function(a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = Masked.apply(a, b > 1)  # type: ignore[no-untyped-call]
        return result * 2

    gm = captured(function)
    assert "masked_fill_" not in names(gm)
    left = torch.randn(2, 5, 4, 6, requires_grad=True)
    gm(a=left, b=torch.randn(2, 5, 4, 6)).square().sum().backward()
    assert left.grad is not None
