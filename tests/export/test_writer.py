"""Writing a packed student: what the file holds and what it computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported_models import Layers, bert, bert_example, layers_example, packed
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.errors import InputError, ParityError
from ti_fx.export import ExportReport, Runtime, check, to_onnx
from ti_fx.export import inputs as io
from ti_fx.export.writer import Options, write_files


@pytest.fixture(scope="module")
def layers() -> GraphModule:
    return packed(Layers(), layers_example())


@pytest.fixture(scope="module")
def student() -> GraphModule:
    return packed(bert(), bert_example())


@pytest.fixture(scope="module")
def exported(student: GraphModule, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    student.train()
    before = ti_fx.dump(student), sorted(student.state_dict())
    report = to_onnx(
        student, tmp_path_factory.mktemp("bert") / "student.onnx", bert_example(), config=bert().config
    )
    assert (ti_fx.dump(student), sorted(student.state_dict())) == before
    assert student.training
    return report


def operators(path: Path, optimised: Path | None = None) -> list[str]:
    """Return the operators of a file, or of what ONNX Runtime makes of it."""
    if optimised is not None:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(optimised)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        path = optimised
    return [node.op_type for node in onnx.load(path).graph.node]


def test_names_of_inputs_outputs_and_axes_are_the_models(exported: ExportReport) -> None:
    graph = onnx.load(exported.path).graph
    axes = {value.name: [dim.dim_param for dim in value.type.tensor_type.shape.dim] for value in graph.input}
    assert axes == {name: ["batch", "sequence"] for name in ("input_ids", "attention_mask")}
    assert [value.name for value in graph.output] == ["logits"]


def test_report_says_where_the_bytes_are(exported: ExportReport) -> None:
    assert exported.bytes == exported.path.stat().st_size
    assert 1.6 < exported.code_bits < 2.0  # the table's five codes a byte, the others' four
    assert 2.0 < exported.code_and_scale_bits < 3.0  # one scale per row of 32 is one more bit
    assert exported.encoding == "int8-tensor"
    text = str(exported)
    assert f"{exported.code_bits:.3f} bits each" in text
    assert "permuted" in text


def test_file_says_what_it_is(exported: ExportReport) -> None:
    model = onnx.load(exported.path)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert (model.producer_name, model.producer_version) == ("ti_fx", ti_fx.__version__)
    assert facts["ti_fx.encoding"] == "int8-tensor"
    assert facts["ti_fx.opset"] == "25"
    assert json.loads(facts["ti_fx.versions"])["torch"] == torch.__version__


def test_configuration_lies_beside_the_file(exported: ExportReport) -> None:
    assert [path.name for path in exported.sidecars] == ["config.json"]
    assert json.loads((exported.path.parent / "config.json").read_text())["hidden_size"] == 32


def test_one_quantiser_serves_query_key_and_value(exported: ExportReport) -> None:
    found = operators(exported.path)
    assert found.count("DynamicQuantizeLinear") == 5  # QKV, output, two feed-forward layers, pooler
    assert found.count("MatMulInteger") == 7
    assert "GatherBlockQuantized" not in found  # the table is tied to no product
    assert found.count("Attention") == 1


def test_onnx_runtime_does_not_fuse_what_would_be_slow_or_wrong(
    exported: ExportReport, tmp_path: Path
) -> None:
    found = operators(exported.path, tmp_path / "optimised.onnx")
    assert "SkipLayerNormalization" not in found  # 5x slower than Sum and LayerNormalization
    assert "MatMulNBits" not in found  # another computation
    assert found.count("DynamicQuantizeMatMul") + found.count("MatMulIntegerToFloat") == 7


def test_files_that_belong_together_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    student, example = packed(Layers(), layers_example()), layers_example()
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    with pytest.raises(InputError):
        write_files({first: (student, example), second: (student, {"other": torch.zeros(2)})}, Options())
    assert list(tmp_path.iterdir()) == []
    reports = write_files({first: (student, example), second: (student, example)}, Options())
    assert [report.path for report in reports] == [first, second]
    assert first.read_bytes() == second.read_bytes()


def test_a_row_of_padding_only_is_what_pytorch_computes(exported: ExportReport, student: GraphModule) -> None:
    inputs = bert_example()
    inputs["attention_mask"][1] = 0
    found = Runtime(exported.path, threads=1)(inputs)["logits"]
    np.testing.assert_allclose(found, io.run_graph(student, inputs)["logits"], atol=1e-6)


def test_check_accepts_the_file_and_refuses_others(exported: ExportReport, student: GraphModule) -> None:
    assert "equal byte for byte" in str(check(exported.path, student, bert_example(2, 11)))


@pytest.mark.parametrize(
    ("encoding", "attention"),
    [
        ("int8-token", False),
        ("reference", False),
        ("float", False),
        ("int8-tensor", True),
        ("int8-token", True),
    ],
)
@pytest.mark.slow
def test_every_encoding_computes_what_was_trained(encoding: str, attention: bool, tmp_path: Path) -> None:
    gm = packed(bert(), bert_example(), encoding, attention=attention)
    report = to_onnx(gm, tmp_path / "student.onnx", bert_example())
    # No value of this small model lies beside a rounding boundary, so only float32 rounding is left.
    assert max(row.maximum for row in report.parity.differences) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["int8-token", "reference", "float"])
def test_small_layers_agree_in_every_encoding(encoding: str, tmp_path: Path) -> None:
    """The biases are large: ONNX Runtime's fused product would lose them with a scale per token."""
    gm = packed(Layers(), layers_example(), encoding)
    path = tmp_path / "layers.onnx"
    report = to_onnx(gm, path, layers_example())
    assert max(row.maximum for row in report.parity.differences) < 1e-5  # float32 sums of values up to 3
    integer = operators(path).count("MatMulInteger")
    assert integer == (0 if encoding == "float" else 2)
    assert "MatMulNBits" not in operators(path, tmp_path / "optimised.onnx")


def test_an_old_opset_stores_the_same_bytes(layers: GraphModule, tmp_path: Path) -> None:
    report = to_onnx(layers, tmp_path / "old.onnx", layers_example(), opset=18)
    assert (report.opset, report.code_bits) == (18, 2.0)
    with pytest.raises(InputError, match="18 to 25"):
        to_onnx(layers, tmp_path / "older.onnx", layers_example(), opset=17)


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.mix = nn.Embedding(1200, 16), nn.Linear(16, 16)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.mix(self.table(ids)), self.table.weight)

    ids = torch.randint(0, 1200, (2, 5))
    gm = packed(Tied(), {"ids": ids}, ternarize={"head": True})
    report = to_onnx(gm, tmp_path / "tied.onnx", {"ids": ids})
    assert [tensor.bytes for tensor in report.tensors if tensor.kind == "codes"] == [1200 * 4, 16 * 4]
    assert [row.output for row in report.parity.differences] == ["output_0"] * 3


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    class Offsets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(16, 1100)
            self.first, self.second, self.other = (
                nn.Parameter(torch.full((1100,), x)) for x in (1.0, 1.0, 2.0)
            )

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.relu(self.mix(x) + self.first) + self.second) * self.other

    torch.manual_seed(0)
    example = {"x": torch.randn(2, 5, 16)}
    gm = packed(Offsets(), example)
    report = to_onnx(gm, tmp_path / "x.onnx", example)
    stored = [tensor.name for tensor in report.tensors if tensor.kind == "other" and tensor.shape == (1100,)]
    assert len(stored) == 3  # the bias, 1 and 2
    check(tmp_path / "x.onnx", gm, example)


def test_other_sizes_stay_within_the_models_limits(student: GraphModule) -> None:
    longest = bert_example(2, 40)
    for wanted in io.other_sizes(student, longest):
        assert wanted["sequence"] < 40
        assert wanted["batch"] != 2
    inputs = io.padded(student, io.resized(student, bert_example(), {"batch": 5, "sequence": 9}))
    assert inputs["input_ids"].shape == (5, 9)
    assert inputs["attention_mask"].sum(1).tolist() == [9, 8, 7, 6, 9]


def test_a_mask_that_is_not_read_is_found_with_an_example_without_padding(
    exported: ExportReport, student: GraphModule, tmp_path: Path
) -> None:
    model = onnx.load(exported.path)
    attention = next(node for node in model.graph.node if node.op_type == "Attention")
    attention.input[3] = ""
    onnx.save(model, tmp_path / "unmasked.onnx")
    whole = {**bert_example(), "attention_mask": torch.ones_like(bert_example()["input_ids"])}
    with pytest.raises(ParityError, match=r"%\w+ \(.*layer 0\) is the first node that differs"):
        check(tmp_path / "unmasked.onnx", student, whole)
