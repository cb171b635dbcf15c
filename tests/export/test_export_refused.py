"""What is refused around a file: graphs, paths, damaged files, inputs that do not fit, and results that disagree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exported_models import Layers, bert, bert_example, layers_example, packed
from torch import Tensor
from torch.fx import GraphModule
from transformers import BertConfig

import ti_fx
from ti_fx.errors import EncodingMismatch, ExportError, InputError, ParityError, PreconditionError
from ti_fx.export import Runtime, check, session, to_onnx
from ti_fx.export.compare import outputs
from ti_fx.passes import Pack, QuantizeActivations, Strip, Ternarize


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
    for tolerance in ("FLOAT_TOLERANCE", "QUANTISED_TOLERANCE", "NOISE_CAP"):
        monkeypatch.setattr(outputs, tolerance, -1.0)
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
