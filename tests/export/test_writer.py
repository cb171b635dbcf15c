"""Writing a packed student: what the file holds, what it computes, and what is refused."""

from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from transformers import BertConfig, BertForSequenceClassification

import ti_fx
from ti_fx.errors import EncodingMismatch, ExportError, InputError, ParityError, PreconditionError
from ti_fx.export import ExportReport, Runtime, check, session, to_onnx
from ti_fx.export import inputs as io
from ti_fx.export.compare import nodes, outputs
from ti_fx.export.writer import Options, write_files
from ti_fx.passes import Pack, QuantizeActivations, Strip, Ternarize

VOCABULARY = 1100


def bert_example(batch: int = 3, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones(batch, length, dtype=torch.long)}


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        id2label={0: "a", 1: "b", 2: "c"},
    )
    model = BertForSequenceClassification(config)
    model.train(False)
    return model


def packed(
    model: nn.Module, example: dict[str, Tensor], encoding: str = "int8-tensor", **options: Any
) -> GraphModule:
    gm = ti_fx.capture(model, example)
    passes = [Ternarize(**options.pop("ternarize", {})), QuantizeActivations(encoding=encoding, **options)]
    ti_fx.Pipeline(*passes, Strip(), Pack())(gm)
    return gm


class Layers(nn.Module):
    """Two ternary layers with a norm, on floating inputs: quick to export."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)
        nn.init.normal_(self.first.bias, std=2.0)

    def forward(self, values: Tensor) -> dict[str, Tensor]:
        hidden = nn.functional.gelu(self.first(values))
        return {"logits": self.head(self.norm(values + self.second(hidden)))}


def layers_example(batch: int = 3) -> dict[str, Tensor]:
    return {"values": torch.randn(batch, 5, 16, generator=torch.Generator().manual_seed(2))}


@pytest.fixture(scope="module")
def layers() -> GraphModule:
    return packed(Layers(), layers_example())


@pytest.fixture(scope="module")
def layers_file(layers: GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layers") / "layers.onnx"
    to_onnx(layers, path, layers_example())
    return path


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


def test_unpacked_graphs_are_refused_by_the_missing_pass(tmp_path: Path) -> None:
    gm = ti_fx.capture(Layers(), layers_example())
    with pytest.raises(PreconditionError, match=r"Ternarize\(\)"):
        to_onnx(gm, tmp_path / "x.onnx", layers_example())
    ti_fx.Pipeline(Ternarize(), QuantizeActivations())(gm)
    with pytest.raises(PreconditionError, match=r"Pack\(\)"):
        to_onnx(gm, tmp_path / "x.onnx", layers_example())
    assert not list(tmp_path.iterdir())


def test_another_encoding_is_refused_or_its_cost_reported(layers: GraphModule, tmp_path: Path) -> None:
    path = tmp_path / "layers.onnx"
    with pytest.raises(EncodingMismatch, match="int8-tensor"):
        to_onnx(layers, path, layers_example(), encoding="reference")
    report = to_onnx(layers, path, layers_example(), encoding="reference", requantize=True)
    assert report.requantized is not None
    assert 0 < report.requantized["logits"] < 0.1  # two 8-bit quantisers, a few percent apart
    assert "requantised" in str(report)
    check(path, layers, layers_example())


def test_a_file_that_disagrees_is_not_kept(
    layers: GraphModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "layers.onnx"
    path.write_bytes(b"the previous file")
    monkeypatch.setattr(outputs, "_allowed", lambda expected, noise: -1.0)
    with pytest.raises(ParityError, match="logits"):
        to_onnx(layers, path, layers_example())
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"the previous file"]


def test_an_id_beyond_its_table_is_refused(student: GraphModule, tmp_path: Path) -> None:
    example = bert_example()
    example["input_ids"][0, 0] = 10**6
    with pytest.raises(InputError, match="an id beyond its table"):
        to_onnx(student, tmp_path / "student.onnx", example)
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written_are_refused(layers: GraphModule, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        to_onnx(layers, tmp_path, layers_example())


def test_damaged_and_foreign_files_are_refused(
    layers: GraphModule, layers_file: Path, tmp_path: Path
) -> None:
    content = layers_file.read_bytes()
    path = tmp_path / "copy.onnx"
    with pytest.raises(InputError, match="can't read"):
        check(path, layers, layers_example())
    for kept in (0, 10, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:kept])
        with pytest.raises(InputError, match="export it again"):
            check(path, layers, layers_example())
    with pytest.raises(InputError, match="there is no file"):
        session(tmp_path / "none.onnx")
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="can't load"):
        session(path)


def test_a_file_of_another_student_is_refused(layers_file: Path) -> None:
    other = Layers()
    with torch.no_grad():
        other.first.weight[0] *= -1
    with pytest.raises(ParityError, match=r"packed\.first\.weight_codes"):
        check(layers_file, packed(other, layers_example()), layers_example())
    with pytest.raises(EncodingMismatch, match="int8-token"):
        check(layers_file, packed(Layers(), layers_example(), "int8-token"), layers_example())


def test_runtime_refuses_inputs_that_do_not_fit(layers_file: Path) -> None:
    run = Runtime(layers_file, threads=1)
    assert run(layers_example(2))["logits"].shape == (2, 5, 4)
    with pytest.raises(InputError, match="takes the inputs values"):
        run({"ids": np.zeros((1, 5, 16), np.float32)})
    with pytest.raises(InputError, match="float64"):
        run({"values": np.zeros((1, 5, 16))})
    with pytest.raises(InputError, match="dimensions"):
        run({"values": np.zeros((5, 16), np.float32)})
    with pytest.raises(InputError, match="has size 3"):
        run({"values": np.zeros((1, 5, 3), np.float32)})
    with pytest.raises(InputError, match="threads"):
        Runtime(layers_file, threads=0)


def test_half_precision_weights_are_refused() -> None:
    gm = packed(Layers().bfloat16(), {"values": layers_example()["values"].bfloat16()})
    with pytest.raises(ExportError, match="float32"):
        to_onnx(gm, "never-written.onnx", {"values": layers_example()["values"].bfloat16()})


def test_other_sizes_stay_within_the_models_limits(student: GraphModule) -> None:
    longest = bert_example(2, 40)
    for wanted in io.other_sizes(student, longest):
        assert wanted["sequence"] < 40
        assert wanted["batch"] != 2
    inputs = io.padded(student, io.resized(student, bert_example(), {"batch": 5, "sequence": 9}))
    assert inputs["input_ids"].shape == (5, 9)
    assert inputs["attention_mask"].sum(1).tolist() == [9, 8, 7, 6, 9]


def test_a_number_before_a_tensor_and_a_needless_squeeze_are_exported(tmp_path: Path) -> None:
    class Masked(Layers):
        def forward(self, values: Tensor, mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            kept = (1.0 - mask) * torch.add(0.25, mask == 0, alpha=0.5)
            # a squeeze of a dimension that is not 1 does nothing, and ONNX has no such squeeze
            return super().forward((values * kept.unsqueeze(-1)).squeeze(1))

    example = {**layers_example(), "mask": torch.tensor([[0, 1, 0, 0, 1]]).expand(3, 5).contiguous()}
    report = to_onnx(packed(Masked(), example), tmp_path / "masked.onnx", example)
    assert report.parity.nodes is not None


def test_a_small_number_is_not_taken_for_nothing(tmp_path: Path) -> None:
    """The exporter's optimiser takes 1e-8 for 0 and 1.000005 for 1."""

    class Small(Layers):
        def forward(self, values: Tensor) -> dict[str, Tensor]:
            size = (values * 1e-4).pow(2).mean(-1, keepdim=True)
            return super().forward(values / (size + 1e-8).sqrt() * (size * 1.000005 / size))

    report = to_onnx(packed(Small(), layers_example()), tmp_path / "small.onnx", layers_example())
    stored = {
        float(onnx.numpy_helper.to_array(one).flat[0]) for one in onnx.load(report.path).graph.initializer
    }
    assert any(value == np.float32(1e-8) for value in stored)
    assert any(value == np.float32(1.000005) for value in stored)


def test_places_in_an_ascending_sequence_are_counted(tmp_path: Path) -> None:
    """ONNX has no searchsorted."""

    class Placed(Layers):
        def forward(self, values: Tensor) -> dict[str, Tensor]:
            ends = values.abs().mul(4).round().cumsum(-1)  # ascending, with equal ones
            edges = torch.tensor([2.0, 5.0, 5.0, 9.0])
            among = torch.searchsorted(edges, ends) + torch.searchsorted(ends, ends / 2, right=True)
            return super().forward(values + among * 0.1)

    report = to_onnx(packed(Placed(), layers_example()), tmp_path / "placed.onnx", layers_example())
    assert report.parity.nodes is not None


def test_parts_of_a_size_that_is_not_fixed_and_masks_as_outputs(tmp_path: Path) -> None:
    """ProphetNet's streams, of as many words each; Gemma 3n's ear returns which frames count."""

    class Streams(Layers):
        def forward(self, values: Tensor) -> dict[str, Tensor]:
            first, *others = torch.cat((values, values * 2, values * 3), 1).chunk(3, dim=1)
            return {**super().forward(first + others[1]), "large": values > 0.5}

    student = packed(Streams(), layers_example(), "float")
    report = to_onnx(student, tmp_path / "streams.onnx", layers_example())
    assert report.parity.nodes is not None


def test_outputs_may_have_several_rows_for_each_of_the_batch(tmp_path: Path) -> None:
    """Codebooks: with the batch in another order, rows change places by groups."""

    class Books(Layers):
        def forward(self, values: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(values)["logits"].reshape(values.shape[0] * 2, -1)}

    report = to_onnx(packed(Books(), layers_example()), tmp_path / "books.onnx", layers_example())
    assert any("permuted" in row.case for row in report.parity.differences)


def test_an_input_that_is_returned_keeps_its_name(tmp_path: Path) -> None:
    class Returning(Layers):
        def forward(self, values: Tensor) -> dict[str, Tensor]:
            return {**super().forward(values), "values": values, "again": values}

    report = to_onnx(packed(Returning(), layers_example()), tmp_path / "returning.onnx", layers_example())
    runtime = Runtime(report.path)
    assert (list(runtime.inputs), list(runtime.outputs)) == (["values"], ["logits", "output_values", "again"])
    found = runtime(layers_example())
    for name in ("output_values", "again"):
        np.testing.assert_array_equal(found[name], layers_example()["values"])


def test_equals_may_be_chosen_in_any_order() -> None:
    """What topk returns of equal values is open, and with it the indices, in whatever type they are read."""
    graph = Graph()
    source = graph.placeholder("source")
    chosen = graph.call_function(torch.ops.aten.topk.default, (source, 3))
    places = graph.call_function(operator.getitem, (chosen, 1))
    short = graph.call_function(torch.ops.aten.to.dtype, (places, torch.int32))
    values = {source: torch.tensor([[4.0, 0.0, 7.0, 0.0]])}
    for node, dtype in ((places, torch.int64), (short, torch.int32)):
        pair = [torch.tensor([[2, 0, last]], dtype=dtype) for last in (1, 3)]
        got, expected = nodes._chosen(node, values, *pair)
        assert torch.equal(got, expected)
        got, expected = nodes._chosen(node, values, pair[0], torch.tensor([[2, 1, 3]], dtype=dtype))
        assert not torch.equal(got, expected)


def test_what_can_not_be_saved_beside_leaves_the_older_file(tmp_path: Path) -> None:
    path, example = tmp_path / "student.onnx", layers_example()
    to_onnx(packed(Layers(), example), path, example, config=BertConfig())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = Layers()
    with torch.no_grad():
        other.first.weight[0] *= -1
    (tmp_path / "tokenizer.json").mkdir()  # comes after config.json

    class Tokenizer:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    with pytest.raises(InputError, match=r"tokenizer\.json is a folder"):
        to_onnx(
            packed(other, example), path, example, config=BertConfig(hidden_size=24), tokenizer=Tokenizer()
        )
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*before, "tokenizer.json"])


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("first.weight", "weight first.weight held NaN or infinity when it was packed"),
        ("norm.bias", "parameter norm.bias holds NaN"),
        ("", "input values holds NaN"),
    ],
)
def test_nan_is_named(place: str, reason: str, tmp_path: Path) -> None:
    model, example = Layers(), layers_example()
    student = None if place else packed(model, example)
    with torch.no_grad():
        (model.get_parameter(place) if place else example["values"]).view(-1)[3] = torch.nan
    if student is None:
        gm = ti_fx.capture(Layers(), example)
        gm.load_state_dict(model.state_dict())
        ti_fx.Pipeline(Ternarize(), QuantizeActivations(), Strip(), Pack())(gm)
        student = gm
    with pytest.raises(InputError, match=reason):
        to_onnx(student, tmp_path / "nan.onnx", example)


def test_inputs_that_are_too_long_are_refused_in_one_line(tmp_path: Path) -> None:
    class Placed(Layers):
        table: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(6.0))

        def forward(self, values: Tensor) -> dict[str, Tensor]:
            places = torch.arange(values.shape[1]).expand(values.shape[:2])
            known = self.table.expand(values.shape[0], 6).gather(1, places)
            return super().forward(values + known.unsqueeze(-1))

    student = packed(Placed(), layers_example())
    long = {"values": torch.randn(3, 9, 16)}
    with pytest.raises(InputError, match=r"can't run these inputs .*are they longer than the model takes"):
        to_onnx(student, tmp_path / "long.onnx", long)


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


@pytest.mark.parametrize("encoding", ["int8-token", "float"])
def test_rows_that_are_no_numbers_are_compared_as_such(encoding: str, tmp_path: Path) -> None:
    """A row that is all padding: NaN in both. The allowance for the others is that of their own range."""

    class Padded(Layers):
        def forward(self, values: Tensor) -> dict[str, Tensor]:
            logits = super().forward(values)["logits"]
            return {
                "logits": torch.where(values[..., :1] > 0.5, logits / torch.zeros_like(logits) * 0, logits)
            }

    example = layers_example()
    report = to_onnx(packed(Padded(), example, encoding), tmp_path / "padded.onnx", example)
    assert all(0 < row.span < 100 and 0 < row.allowed < 100 for row in report.parity.differences)
