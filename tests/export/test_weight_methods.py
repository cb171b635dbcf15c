"""Weights by other methods and with scales by groups are exported, and ONNX Runtime computes the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
from small_attention import example, small_attention
from torch.fx import GraphModule

import ti_fx
from ti_fx.export import to_onnx
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
        ("nbits2-32", "group-64", "twn", "MatMulNBits"),  # two blocks to a scale
        ("nbits2", "group-128", "seq", "MatMulNBits"),
        ("nbits2", "group-32", "binary", "MatMul"),  # fewer neighbours to a scale than a block has
        ("int8-token", "row", "absmean", "MatMulInteger"),
        ("base3", "group-64", "sherry", "MatMul"),
        ("float", "group-32", "lsq", "MatMul"),
        ("int8-tensor", "row", "dlt", "MatMul"),  # what is added is multiplied, too
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


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity_passes_in_every_encoding(
    captured: GraphModule, tmp_path: Path, granularity: str, encoding: str
) -> None:
    methods = list(METHODS)  # a file has codes and scales, whatever made them
    place = GRANULARITIES.index(granularity) + list(ENCODINGS).index(encoding)  # type: ignore[arg-type]
    method = methods[place % len(methods)]
    ternarize = Ternarize(weights=granularity, method=method, min_rows=32)  # type: ignore[arg-type]
    exported(captured, tmp_path, ternarize, encoding)
