"""Weights by other methods and with scales by groups are exported, and ONNX Runtime computes the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from small_attention import WIDER, WIDTH, SmallAttention, example, small_attention
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.export import pack_from, to_onnx
from ti_fx.export.report import ExportReport
from ti_fx.ir.edit import fork
from ti_fx.numerics.encodings import ENCODINGS
from ti_fx.numerics.weight_codes import GRANULARITIES
from ti_fx.numerics.weight_quantisers import METHODS
from ti_fx.passes import Pack, QuantizeActivations, Strip, Ternarize


@pytest.fixture(scope="module")
def captured() -> GraphModule:
    return small_attention()


def exported(
    captured: GraphModule, folder: Path, ternarize: Ternarize, encoding: str
) -> tuple[ExportReport, Counter[str]]:
    """Return the report of a student's file, which passed its comparison, and how often it has each operator."""
    gm = fork(captured)
    ti_fx.Pipeline(ternarize, QuantizeActivations(encoding=encoding), Strip(), Pack())(gm)
    report = to_onnx(gm, folder / "student.onnx", example())
    model = onnx.load(folder / "student.onnx", load_external_data=False)
    return report, Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize(
    ("encoding", "granularity", "method", "products"),
    [
        ("nbits2-32", "group-64", "seq", "MatMulNBits"),  # two blocks to a scale
        ("int8-tensor", "row", "dlt", "MatMul"),  # what is added is multiplied, too
        pytest.param("nbits2", "group-128", "binary", "MatMulNBits", marks=pytest.mark.slow),
        pytest.param(
            "nbits2", "group-32", "twn", "MatMul", marks=pytest.mark.slow
        ),  # less than a block to a scale
        pytest.param("int8-token", "row", "absmean", "MatMulInteger", marks=pytest.mark.slow),
    ],
)
def test_a_file_has_the_product_that_its_scales_allow(
    captured: GraphModule, tmp_path: Path, encoding: str, granularity: str, method: str, products: str
) -> None:
    ternarize = Ternarize(weights=granularity, method=method, min_rows=32)  # type: ignore[arg-type]
    report, operators = exported(captured, tmp_path, ternarize, encoding)
    assert operators[products] == (6 if products != "MatMul" else 8)  # two are attention's own
    assert report.ternary_weights == 64 * 160 + 4 * 160 * 160 + 2 * 160 * 200


def test_a_table_with_a_scale_per_group_is_looked_up(captured: GraphModule, tmp_path: Path) -> None:
    report, operators = exported(captured, tmp_path, Ternarize(embeddings="group-64", min_rows=32), "float")
    scales = {one.name: one.shape for one in report.tensors if one.kind == "scale"}
    assert scales["packed.words.weight_scale"] == (64, 3)
    assert operators["Gather"] >= 2


@pytest.mark.parametrize("method", ["sherry", "dlt"])
def test_weights_that_are_read_one_by_one_are_packed_by_their_method(
    captured: GraphModule, method: str
) -> None:
    passes = (Ternarize(weights="group-64", method=method, min_rows=32), Strip())
    expected, hollow = fork(captured), ti_fx.capture(SmallAttention().to("meta"), example())
    ti_fx.Pipeline(*passes, Pack())(expected)
    ti_fx.Pipeline(*passes)(hollow)
    pack_from(hollow, captured.state_dict())
    assert all(torch.equal(value, hollow.state_dict()[name]) for name, value in expected.state_dict().items())
    assert ti_fx.dump(hollow) == ti_fx.dump(expected)


class InputsFirst(nn.Module):
    """Two products of weights that are stored as (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(WIDTH, WIDER) / 10)
        self.down = nn.Parameter(torch.randn(WIDER, WIDTH) / 10)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        scored: Tensor = self.head((hidden @ self.up).relu() @ self.down)
        return scored


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["nbits2", "int8-token"])
@pytest.mark.parametrize("method", ["twn", "sherry", "dlt"])
def test_weights_with_their_inputs_first_have_groups_of_outputs(
    tmp_path: Path, method: str, encoding: str
) -> None:
    values = {"hidden": torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))}
    gm = ti_fx.capture(InputsFirst(), values).eval()
    passes = (Ternarize(weights="group-128", method=method), QuantizeActivations(encoding=encoding), Pack())
    ti_fx.Pipeline(*passes)(gm)
    assert to_onnx(gm, tmp_path / "student.onnx", values).ternary_weights == 2 * WIDTH * WIDER


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity_passes_in_every_encoding(
    captured: GraphModule, tmp_path: Path, granularity: str, encoding: str
) -> None:
    methods = list(METHODS)  # a file has codes and scales, whatever made them
    place = GRANULARITIES.index(granularity) + list(ENCODINGS).index(encoding)
    method = methods[place % len(methods)]
    ternarize = Ternarize(weights=granularity, method=method, min_rows=32)  # type: ignore[arg-type]
    exported(captured, tmp_path, ternarize, encoding)
