"""A quantiser that nothing else knows goes from training to a checked file."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import ti_fx
from ti_fx.export import check, to_onnx
from ti_fx.numerics import encodings, quantisers
from ti_fx.numerics.encodings import Encoding
from ti_fx.numerics.gradients import straight_through
from ti_fx.numerics.quantiser import Quantiser
from ti_fx.passes import Pack, QuantizeActivations, Ternarize

INPUT = {"input": torch.linspace(-3, 3, 6 * 64).view(6, 64)}


def eighths(value: Tensor) -> Tensor:
    """Round to eighths, whatever the range: no scale, so no product of integers."""
    return straight_through(value, _rounded)


def _rounded(value: Tensor) -> Tensor:
    return (value * 8).round() / 8


def eighths_in_onnx(value: Tensor) -> Tensor:
    return _rounded(value)


def step(value: Tensor) -> Tensor:
    return torch.tensor(1 / 8, dtype=torch.float64)


@pytest.fixture
def encoding(monkeypatch: pytest.MonkeyPatch) -> str:
    """What a file in ``ti_fx/numerics/quantisers`` and a row of ``ti_fx/numerics/encodings.py`` add."""
    made = Quantiser(eighths, batch_invariant=True, step=step, codes=None, value=eighths_in_onnx, opset=18)
    monkeypatch.setitem(quantisers.QUANTISERS, made.name, made)
    monkeypatch.setitem(quantisers.BY_FUNCTION, eighths, made)
    monkeypatch.setitem(encodings.ENCODINGS, "eighths", Encoding("eighths", made.name, "to eighths"))
    return "eighths"


def test_a_quantiser_touches_its_own_file_alone(encoding: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm = ti_fx.capture(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)).eval(), INPUT)
    ti_fx.Pipeline(Ternarize(), QuantizeActivations(encoding), Pack())(gm)
    assert "eighths(%input" in ti_fx.dump(gm)
    report = to_onnx(gm, tmp_path / "student.onnx", INPUT)
    assert (report.encoding, report.batch_invariant) == (encoding, True)
    assert report.parity.nodes is not None
    assert "Round" in [node.op_type for node in onnx.load(report.path).graph.node]
    check(report.path, gm, INPUT)
    other = to_onnx(gm, tmp_path / "other.onnx", INPUT, encoding="int8-token", requantize=True)
    assert other.requantized is not None
    check(other.path, gm, INPUT)
    again = to_onnx(gm, tmp_path / "float.onnx", INPUT, encoding="float", requantize=True)
    assert again.encoding == "float"
