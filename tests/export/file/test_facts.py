"""What a file says of itself: true, the same for the same student, and nothing of the machine."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from exported_models import Layers, layers_example
from torch.fx import GraphModule
from transformers import BertConfig

import ti_fx
from ti_fx.errors import InputError
from ti_fx.export import ExportReport, Runtime, check, to_onnx
from ti_fx.export.file.metadata import tensors_hash, value_of
from ti_fx.export.file.minimum_runtime import minimum_runtime
from ti_fx.export.run.session import reason_of
from ti_fx.find.packed import batch_dependent
from ti_fx.ir.facts import record_facts
from ti_fx.passes import Pack, QuantizeActivations, Ternarize
from ti_fx.recipe import Recipe


def student(kept: Any = "float32", **encodings: str) -> GraphModule:
    gm = ti_fx.capture(Layers(), layers_example())
    ti_fx.Pipeline(Ternarize(), QuantizeActivations("int8-token", encodings=encodings), Pack(kept))(gm)
    return gm


def config(name: str) -> BertConfig:
    """The configuration of a model that was loaded from this place."""
    made = BertConfig()
    made.name_or_path = name
    return made


def metadata(report: ExportReport) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(report.path).metadata_props}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    gm = student("float16", **{"second.weight": "int8-tensor"})
    record_facts(gm, recipe=Recipe.preset("ti-g").to_dict())  # as Recipe.prepare records it
    return to_onnx(
        gm,
        tmp_path_factory.mktemp("mixed") / "student.onnx",
        layers_example(),
        config=config("organisation/name"),
    )


def test_a_file_says_what_it_is(mixed: ExportReport) -> None:
    found = metadata(mixed)
    assert found["ti_fx.encoding"] == "int8-token"
    assert json.loads(found["ti_fx.weight_encodings"]) == {"second.weight": "int8-tensor"}
    assert json.loads(found["ti_fx.kept"]) == {"float16": 6}  # biases, norm and head
    assert json.loads(found["ti_fx.source"]) == {"class": "Layers", "name": "organisation/name"}
    assert json.loads(found["ti_fx.versions"])["onnxruntime"] == onnxruntime.__version__
    assert found["ti_fx.minimum_onnxruntime"] == "1.24"
    recipe = found["ti_fx.recipe"]
    assert Recipe.from_dict(json.loads(recipe)) == Recipe.preset("ti-g")
    assert found["ti_fx.recipe_sha256"] == hashlib.sha256(recipe.encode()).hexdigest()


def test_the_report_names_the_weights_through_which_a_row_depends_on_its_batch(mixed: ExportReport) -> None:
    assert (mixed.batch_invariant, mixed.batch_dependent) == (False, ("second.weight",))
    assert (
        "depends on what else is in its batch: one range of activations for all, before second.weight"
        in str(mixed)
    )
    assert json.loads(metadata(mixed)["ti_fx.batch_dependent"]) == ["second.weight"]
    assert batch_dependent(student()) == ()


def test_quantised_attention_depends_on_the_batch(bert: Any) -> None:
    gm = bert.fork()
    ti_fx.Pipeline(Ternarize(), QuantizeActivations("int8-tensor", attention=True), Pack())(gm)
    found = batch_dependent(gm)
    assert "attention" in found
    assert any(name.endswith("query.weight") for name in found)
    assert not any("embeddings" in name for name in found)  # rows are looked up


def test_the_same_student_gives_the_same_bytes_wherever_it_is_written(
    mixed: ExportReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "organisation").mkdir()
    monkeypatch.chdir(tmp_path)
    gm = student("float16", **{"second.weight": "int8-tensor"})
    record_facts(gm, recipe=Recipe.preset("ti-g").to_dict())
    again = to_onnx(gm, tmp_path / "other-name.onnx", layers_example(), config=config("organisation/name"))
    content = again.path.read_bytes()
    assert content == mixed.path.read_bytes()
    for place in (str(tmp_path), str(Path(ti_fx.__file__).parents[1]), str(Path.home()), ".py"):
        assert place.encode() not in content


def test_a_folder_of_this_machine_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ti_fx.export.file.metadata import source_of

    (tmp_path / "runs/teacher").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    gm = student()
    for name in (str(tmp_path), str(tmp_path / "gone"), "runs/teacher", "./model", "../model", "~/model", ""):
        assert source_of(gm, config(name)) == {"class": "Layers"}
    assert source_of(gm, None) == {"class": "Layers"}
    assert source_of(gm, config("bert-base-uncased"))["name"] == "bert-base-uncased"


def test_the_hash_of_the_tensors_is_that_of_every_one() -> None:
    first, second = student(), student()
    assert tensors_hash(first) == tensors_hash(second)
    with torch.no_grad():
        second.get_buffer("packed.first.weight_codes")[0] ^= 1
    changed = tensors_hash(second)
    assert changed != tensors_hash(first)
    with torch.no_grad():
        second.get_parameter("norm.bias")[0] += 1
    assert tensors_hash(second) != changed


def test_damaged_metadata_is_refused() -> None:
    assert value_of({}, "ti_fx.largest", {}) == {}
    with pytest.raises(InputError, match=r"metadata ti_fx\.largest is damaged"):
        value_of({"ti_fx.largest": "{"}, "ti_fx.largest", {})


@pytest.mark.parametrize(
    ("opset", "operators", "oldest"),
    [
        (18, ("MatMulInteger",), "1.15"),
        (21, ("MatMulInteger",), "1.18"),
        (21, ("QuantizeLinear",), "1.20"),
        (25, ("QuantizeLinear",), "1.24"),
        (18, ("com.microsoft::GatherBlockQuantized",), "1.27"),
        (25, ("com.microsoft::GatherBlockQuantized", "com.microsoft::MatMulNBits"), "1.28"),
        (18, ("com.microsoft::NeverMeasured",), ".".join(onnxruntime.__version__.split(".")[:2])),
    ],
)
def test_the_minimum_runtime_is_that_of_the_operators(
    opset: int, operators: tuple[str, ...], oldest: str
) -> None:
    nodes = []
    for name in operators:
        domain, _, kind = name.rpartition("::")
        blocks = [ir.AttrInt64("block_size", 32)] if kind == "QuantizeLinear" else []
        nodes.append(ir.Node(domain, kind, [], blocks))
    graph = ir.Graph([], [], nodes=nodes, opset_imports={"": opset, "com.microsoft": 1})
    assert minimum_runtime(ir.Model(graph, ir_version=8)) == oldest


def test_an_older_runtime_than_the_file_needs_is_refused(
    mixed: ExportReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = r"student\.onnx needs ONNX Runtime 1\.24 or newer, and 1\.20\.1 is installed"
    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    with pytest.raises(InputError, match=older):
        Runtime(mixed.path)
    with pytest.raises(InputError, match=older):
        check(mixed.path, student("float16", **{"second.weight": "int8-tensor"}), layers_example())
    for newer in ("1.24.0", "1.33.0.dev20270101", "2.0"):
        monkeypatch.setattr(onnxruntime, "__version__", newer)
        assert Runtime(mixed.path).outputs


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Load model from /a/very/long/path/of/somebody/student.onnx failed:"
            "/onnxruntime_src/onnxruntime/core/graph/model.cc:181 onnxruntime::Model::Model(onnx::ModelProto&&, const "
            "onnxruntime::PathString&, const onnxruntime::IOnnxRuntimeOpSchemaRegistryList*, const "
            "onnxruntime::logging::Logger&, const onnxruntime::ModelOptions&) Unsupported model IR version: 13, max "
            "supported IR version: 10\n",
            "Unsupported model IR version: 13, max supported IR version: 10",
        ),
        (
            "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code returned while running Gather node. "
            "Name:'look' Status Message: /src/core/cpu/tensor/gather.cc:94 indices element out of data bounds, "
            "idx=7 must be within the inclusive range [-3,2]",
            "Non-zero status code returned while running Gather node. Name:'look' Status Message: indices element out "
            "of data bounds, idx=7 must be within the inclusive range [-3,2]",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running GatherElements node. Name:'g' "
            "Status Message: /src/gather_elements.cc:147 void onnxruntime::core_impl(const Tensor*) [with Tin = "
            "long int; int64_t = long int] GatherElements op: Out of range value in index tensor\n",
            "Non-zero status code returned while running GatherElements node. Name:'g' Status Message: GatherElements "
            "op: Out of range value in index tensor",
        ),
        ("x" * 500, "x" * 300 + "..."),
    ],
)
def test_what_onnx_runtime_says_is_cut_to_its_reason(said: str, reason: str) -> None:
    assert reason_of(RuntimeError(said)) == reason
