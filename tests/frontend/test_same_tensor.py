"""One tensor given for two inputs stays two inputs, in the graph and in the file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import ti_fx
from ti_fx.export import Runtime, to_onnx
from ti_fx.passes import Pack, Ternarize


class Pair(nn.Module):
    """Two texts, read by one table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.head = nn.Embedding(1100, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        found: Tensor = self.head(self.first(self.table(one)) - 2 * self.first(self.table(other)))
        return found


def test_a_tensor_that_is_given_twice_is_two_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Pair(), torch.randint(0, 1100, (2, 5))
    gm = ti_fx.capture(model, {"one": ids, "other": ids})
    different = {"one": ids, "other": ids.flip(1)}
    torch.testing.assert_close(gm(**different), model(**different))
    ti_fx.Pipeline(Ternarize(), Pack())(gm)
    to_onnx(gm, tmp_path / "pair.onnx", {"one": ids, "other": ids})
    (found,) = Runtime(tmp_path / "pair.onnx").tensors(different).values()
    torch.testing.assert_close(found, gm(**different), rtol=0, atol=1e-5)
