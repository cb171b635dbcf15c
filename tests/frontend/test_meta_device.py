"""A model without values (meta device) is captured, planned and rewritten; what needs values says so."""

from __future__ import annotations

import pytest
import torch
from models import bert_model, llama_model, text_example
from torch import Tensor, nn

import ti_fx
from ti_fx.errors import CaptureError, PreconditionError
from ti_fx.passes import (
    DecomposeAttention,
    Distill,
    DuplicateTeacher,
    Intervene,
    Pack,
    QuantizeActivations,
    Strip,
    Ternarize,
)

PREPARE = (DecomposeAttention(), DuplicateTeacher(), Ternarize(), QuantizeActivations(), Distill())


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return llama_model()


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), "meta"])
def test_the_graph_is_what_a_model_with_values_gives(device: str) -> None:
    example = {name: value.to(device) for name, value in text_example().items()}
    found, expected = ti_fx.capture(on_meta(), example), ti_fx.capture(llama_model(), text_example())
    assert ti_fx.dump(found) == ti_fx.dump(expected)
    for one in (*PREPARE, Intervene("map"), Intervene("context"), Intervene("output"), Intervene(), Strip()):
        for gm in (found, expected):
            ti_fx.Pipeline(one)(gm)
        assert ti_fx.dump(found) == ti_fx.dump(expected), one
    ti_fx.verify(found)
    assert len(ti_fx.find_attention(found)) == 2
    assert all(parameter.is_meta for parameter in found.parameters())


@pytest.mark.slow
def test_the_report_says_what_was_not_compared() -> None:
    report = ti_fx.capture_report(ti_fx.capture(on_meta(), text_example()))
    assert report.checked == {}
    assert "values not compared with the model" in str(report)
    assert "shapes and dtypes are equal" in str(report)
    compared = ti_fx.capture_report(ti_fx.capture(bert_model(1), text_example()))
    assert compared.unchecked is None


class Reads(nn.Module):
    """Looks at a value outside of the trace."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            assert x.sum().item() is not None
        result: Tensor = self.linear(x)
        return result


class Branches(Reads):
    """Returns another dtype outside of the trace."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        return result if torch.compiler.is_exporting() else result.double()


def test_a_model_that_reads_values_is_captured_and_not_compared() -> None:
    with torch.device("meta"):
        model = Reads()
    report = ti_fx.capture_report(ti_fx.capture(model, {"x": torch.ones(2, 4)}))
    assert report.unchecked is not None
    assert "does not run without values" in report.unchecked
    assert "\n" not in report.unchecked


def test_other_dtypes_than_the_models_are_refused() -> None:
    with torch.device("meta"):
        model = Branches()
    with pytest.raises(CaptureError, match="other shapes or dtypes than the model in eval mode"):
        ti_fx.capture(model, {"x": torch.ones(2, 4)})


@pytest.mark.slow
def test_packing_needs_values() -> None:
    gm = ti_fx.capture(on_meta(), text_example())
    ti_fx.Pipeline(Ternarize())(gm)
    with pytest.raises(PreconditionError, match=r"pack needs values, and .* is on the meta device"):
        ti_fx.Pipeline(Pack())(gm)
