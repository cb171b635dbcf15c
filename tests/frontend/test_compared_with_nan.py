"""A graph that gives NaN where its model gives a number is refused, wherever among the outputs that is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ti_fx
from ti_fx.errors import CaptureError
from ti_fx.frontend.compare import compare_values

INPUT = {"values": torch.linspace(-1, 1, 8).view(2, 4)}


class Two(nn.Module):
    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.tensor(first)), nn.Parameter(torch.tensor(second))

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return values * self.first, values * self.second


@pytest.mark.parametrize(
    "broken", [(float("nan"), 1.0), (1.0, float("nan")), (1.0, float("inf"))], ids=["first", "second", "inf"]
)
def test_a_number_in_one_alone_is_a_difference(broken: tuple[float, float]) -> None:
    model = Two(1.0, 1.0)
    gm = ti_fx.capture(copy.deepcopy(model), INPUT)
    with torch.no_grad():
        for parameter, value in zip(gm.parameters(), broken, strict=True):
            parameter.fill_(value)
    with pytest.raises(CaptureError, match=r"differs from the model in eval mode \(relative inf\)"):
        compare_values(model, gm, INPUT, {})


def test_nan_in_both_is_none() -> None:
    model = Two(1.0, float("nan"))
    gm = ti_fx.capture(model, INPUT)
    found = compare_values(model, gm, INPUT, {})
    assert (found.checked, found.unchecked) == ({"eval": 0.0, "train": 0.0}, None)
