"""Capture runs a model at other sizes, too; what it settles there by itself is put back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ti_fx


class Settles(nn.Module):
    """Shrinks its window to the first short input, and keeps another layer from then on, as some vision models do."""

    def __init__(self) -> None:
        super().__init__()
        self.window = 4
        self.layer: nn.Module = nn.Linear(6, 6)

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.shape[1] <= self.window:
            self.window = 1
            self.layer = nn.Sequential(self.layer, nn.Dropout(0.5))
        result: Tensor = self.layer(hidden) / self.window
        return result


def test_a_model_keeps_what_it_had() -> None:
    torch.manual_seed(0)
    model = Settles().eval()
    layer, example = model.layer, {"hidden": torch.randn(2, 8, 6)}
    gm = ti_fx.capture(model, example).eval()
    assert (model.window, model.layer) == (4, layer)
    assert list(model._modules) == ["layer"]
    for length in (5, 9, 16):
        value = torch.randn(3, length, 6)
        assert torch.equal(gm(hidden=value), model(value))
