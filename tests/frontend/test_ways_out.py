"""What capture refuses is said in one line that names the operator or the field, and what to write instead."""

from __future__ import annotations

import pkgutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ti_fx
from ti_fx.errors import CaptureError, RandomnessError

while_loop: Any = pkgutil.resolve_name("torch._higher_order_ops.while_loop:while_loop")


class _Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen: Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
        result: Tensor = self.dense(chosen)
        return result


class _Routed(_Chosen):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen: Tensor = torch.cond(x.shape[0] > 3, self.dense, self.other, (x,))
        return chosen + torch.cond(x.sum() > 0, self.dense, self.other, (x,))


class _Repeated(_Chosen):
    def forward(self, x: Tensor) -> Tensor:
        _, repeated = while_loop(lambda n, y: n < 3, lambda n, y: (n + 1, y * 2), (torch.tensor(0), x))
        result: Tensor = self.dense(repeated)
        return result


@pytest.mark.parametrize(
    ("kind", "instead"),
    [(_Chosen, "choose with torch.where"), (_Repeated, "a Python loop of a fixed number")],
)
def test_operators_with_graphs_of_their_own(kind: type[nn.Module], instead: str) -> None:
    with pytest.raises(CaptureError, match=instead) as caught:
        ti_fx.capture(kind(), {"x": torch.randn(2, 4)})
    assert "\n" not in str(caught.value)


class _Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 4)
        self.layerdrop = 0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand([]) < self.layerdrop:
            return x
        result: Tensor = self.dense(x)
        return result


def test_the_field_that_drops_layers_is_named() -> None:
    model = nn.Sequential(_Dropping())
    with pytest.raises(RandomnessError, match=r"set 0\.layerdrop = 0 on the model"):
        ti_fx.capture(model, {"input": torch.randn(2, 4)})
