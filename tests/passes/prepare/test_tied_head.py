"""A head that is tied to the word embedding: ternary at both ends and stored once, or kept in full precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule

import ti_fx
from ti_fx import numerics
from ti_fx.export import to_onnx
from ti_fx.find.walk import projection_weight, reads_ternary
from ti_fx.ir.edit import aten_name
from ti_fx.passes import Distill, DuplicateTeacher, Pack, QuantizeActivations, Strip, Ternarize
from ti_fx.zoo import build

TABLE = "transformer.wte.weight"


@pytest.fixture(scope="module")
def captured() -> GraphModule:
    entry = build("gpt2")
    return ti_fx.capture(entry.model, entry.example)


def heads(gm: GraphModule) -> list[bool]:
    """Return, for each student projection by the table, whether it reads it ternary."""
    return [
        reads_ternary(node)
        for node in gm.graph.nodes
        if (weight := projection_weight(node)) is not None and weight.target == TABLE
    ]


def prepared(captured: GraphModule, tied: str) -> GraphModule:
    gm = ti_fx.fork(captured)
    passes = (
        DuplicateTeacher(),
        Ternarize(min_rows=64, tied=tied),  # type: ignore[arg-type]
        QuantizeActivations(),
        Distill(),
    )
    ti_fx.Pipeline(*passes)(gm)
    return gm


def test_by_default_both_ends_are_ternary(captured: GraphModule) -> None:
    assert heads(prepared(captured, "both")) == [True]


def test_a_kept_head_reads_the_parameter_and_keeps_its_input(captured: GraphModule) -> None:
    gm = prepared(captured, "embedding")
    assert heads(gm) == [False]
    head = next(
        node
        for node in gm.graph.nodes
        if (weight := projection_weight(node)) is not None and weight.target == TABLE
    )
    assert head.args[0].target is not numerics.int8_tensor
    embedding = next(node for node in gm.graph.nodes if aten_name(node) == "embedding")
    assert embedding.args[0].target is numerics.ternary
    ti_fx.verify(gm)


def test_the_option_is_replaced_when_the_pass_runs_again(captured: GraphModule) -> None:
    gm = prepared(captured, "both")
    ti_fx.Pipeline(Ternarize(min_rows=64, tied="embedding"))(gm)
    assert heads(gm) == [False]
    ti_fx.Pipeline(Ternarize(min_rows=64, tied="both"))(gm)
    assert ti_fx.diff(gm, prepared(captured, "both")) == ""


@pytest.mark.parametrize(
    ("tied", "copies"), [("both", 0), pytest.param("embedding", 1, marks=pytest.mark.slow)]
)
def test_the_table_is_stored_once_or_with_its_full_precision(
    captured: GraphModule, tied: str, copies: int, tmp_path: Path
) -> None:
    gm = prepared(captured, tied)
    ti_fx.Pipeline(Strip(), Pack())(gm)
    ids = torch.randint(1, 60, (2, 7))
    report = to_onnx(
        gm, tmp_path / "student.onnx", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    )
    rows, columns = captured.get_parameter(TABLE).shape
    stored = [tensor for tensor in report.tensors if tensor.shape in ((rows, columns), (columns, rows))]
    assert sum(tensor.bytes == 4 * rows * columns for tensor in stored) == copies
    assert sum(tensor.kind == "codes" and TABLE in tensor.name for tensor in report.tensors) == 1
