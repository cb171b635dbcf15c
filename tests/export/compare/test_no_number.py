"""One value of a quantised file that is infinite in one alone fails the check, though all others are close."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ti_fx
from ti_fx.errors import ParityError
from ti_fx.export import check, to_onnx
from ti_fx.export.compare.outputs import compare_outputs
from ti_fx.export.file.content import open_file
from ti_fx.passes import Pack, QuantizeActivations, Ternarize

INPUT = {"values": torch.randn(4, 64, generator=torch.Generator().manual_seed(0))}


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 256)

    def forward(self, values: Tensor) -> Tensor:
        logits: Tensor = self.second(torch.tanh(self.first(values)))
        return logits


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_a_value_that_is_no_number_in_one_alone_fails(wrong: float, tmp_path: Path) -> None:
    gm = ti_fx.capture(Wide(), INPUT)
    ti_fx.Pipeline(Ternarize(), QuantizeActivations(), Pack())(gm)
    path = to_onnx(gm, tmp_path / "student.onnx", INPUT).path
    file = open_file(path)
    found = compare_outputs(file, gm, INPUT, exact=False)
    assert found.failure is None
    assert all(row.p99 <= row.allowed for row in found.rows)
    with torch.no_grad():
        dict(gm.named_parameters())["second.bias"][17] = wrong  # one of 256: less than 1%
    assert compare_outputs(file, gm, INPUT, exact=False).failure is not None
    with pytest.raises(ParityError):
        check(path, gm, INPUT)
