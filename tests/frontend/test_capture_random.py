"""A random number that decides nothing is no reason to refuse a model; one that does is."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn

import ti_fx
from ti_fx.errors import RandomnessError

EXAMPLE = {"value": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}


class Drops(nn.Module):
    def __init__(self, drop: Callable[[float], bool], probability: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop, self.probability = drop, probability

    def forward(self, value: Tensor) -> Tensor:
        if not (self.training and self.drop(self.probability)):
            value = self.first(value)
        result: Tensor = self.last(nn.functional.dropout(value, 0.5, self.training))
        return result


DRAWS: list[Callable[[float], bool]] = [
    lambda p: torch.rand(1).item() <= p,
    lambda p: bool(torch.rand((1,)) < p),
    lambda p: float(torch.empty(1).uniform_(0, 1)) < p,
    lambda p: bool(torch.bernoulli(torch.tensor([p]))),
    lambda p: torch.empty(1).bernoulli_(p).item() == 1,
    lambda p: torch.rand([]).item() < p,
    lambda p: random.random() <= p,
    lambda p: random.uniform(0, 1) < p,
    lambda p: numpy.random.uniform(0, 1) < p,
    lambda p: numpy.random.rand() < p,
    lambda p: bool(torch.rand(1) >= 1 - p),
]


@pytest.mark.parametrize("drop", DRAWS)
def test_a_layer_that_is_never_dropped_is_captured_and_one_that_may_be_is_not(
    drop: Callable[[float], bool],
) -> None:
    torch.manual_seed(0)
    model = Drops(drop, 0.0)
    gm = ti_fx.capture(model, EXAMPLE)
    assert ti_fx.capture_report(gm).checked == {"eval": 0.0, "train": 0.0}
    assert not any("rand" in node.name or "bernoulli" in node.name for node in gm.graph.nodes)
    with pytest.raises(RandomnessError):
        ti_fx.capture(Drops(drop, 0.01), EXAMPLE)


def test_a_generator_of_the_modules_own_is_named() -> None:
    model = Drops(lambda p: bool(model.generator.random() < p), 0.1)
    model.generator = numpy.random.default_rng(0)
    with pytest.raises(RandomnessError, match="draws random numbers in Python \\(generator\\)"):
        ti_fx.capture(model, EXAMPLE)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Tensor:
        result: Tensor = self.linear(value + torch.rand(1))
        return result


def test_a_random_number_that_is_only_computed_with_stays_random() -> None:
    gm = ti_fx.capture(Noisy(), EXAMPLE)
    assert not torch.equal(gm(**EXAMPLE), gm(**EXAMPLE))
