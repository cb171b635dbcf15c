"""Every encoding: what is trained is what the file computes, in ONNX Runtime, and its codes are as small as it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from encoded_model import ROWS, Model, example, packed, prepared
from grids import each
from slow import slow
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.errors import EncodingMismatch, InputError, ParityError, PreconditionError, SelectionError
from ti_fx.export import ExportReport, Runtime, check, to_onnx
from ti_fx.export import inputs as io
from ti_fx.find.packed import encoding_of
from ti_fx.ir.facts import facts
from ti_fx.numerics.codes import pack_codes
from ti_fx.numerics.encodings import ENCODINGS
from ti_fx.numerics.layouts import LAYOUTS
from ti_fx.passes import DuplicateTeacher, Intervene, Pack, QuantizeActivations, Strip, Ternarize
from ti_fx.recipe import Recipe

BLOCKS = {"nbits2": 128, "nbits2-64": 64, "nbits2-32": 32}

SAME_NUMERICS = ("int8-tensor", "portable", "base3")


class Files(dict[str, tuple[GraphModule, ExportReport]]):
    """The packed student and its file, by encoding, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> tuple[GraphModule, ExportReport]:
        gm = packed(QuantizeActivations(encoding=name))
        self[name] = gm, to_onnx(gm, self.folder / f"{name}.onnx", example())
        return self[name]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("encodings"))


def nodes_of(path: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(path).graph.node)


def optimised(path: Path, folder: Path) -> list[onnx.NodeProto]:
    """Return the nodes that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return nodes_of(folder / "optimised.onnx")


@pytest.mark.parametrize("name", each())
def test_onnx_runtime_computes_what_was_trained(files: Files, name: str) -> None:
    gm, report = files[name]
    assert report.encoding == name
    # the same activations, so only the order of float32 sums differs: the biases are of size 3
    single = report.parity.nodes
    assert single is not None
    assert single.worst < 1e-5
    runtime = Runtime(report.path, threads=1)
    for batch, length in ((1, 2), (1, 130), (4, 3)):
        inputs = example(batch, length)
        found = torch.from_numpy(runtime(inputs)["logits"])
        expected = io.run_graph(gm, inputs)["logits"]
        if name.startswith(("int4", "int2")):  # beside a boundary a step is a large share of a token's range
            apart = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert (apart < 3e-3).float().mean() > 0.95, (batch, length)
            continue
        distance = (found - expected).norm() / expected.norm()
        # one activation beside a rounding boundary moves a row by 1e-3; another quantiser moves it by 1e-2
        assert distance < 3e-3, (batch, length)


@pytest.mark.parametrize("name", each())
def test_codes_and_tied_tables_are_stored_once_and_small(files: Files, name: str) -> None:
    _, report = files[name]
    assert report.code_bits <= (1.61 if name == "base3" else 2.0)
    codes = [tensor.name for tensor in report.tensors if tensor.kind == "codes"]
    weights = ("first.weight", "second.weight", "table.weight", "transposed")
    assert sorted(codes) == [f"packed.{weight}_codes" for weight in weights]
    # nothing else is large: no second copy of codes, no expanded scales
    assert max(tensor.bytes for tensor in report.tensors if tensor.kind == "other") <= 1280


@pytest.mark.parametrize("name", each())
def test_files_are_checked_by_themselves(files: Files, name: str) -> None:
    gm, report = files[name]
    assert "equal byte for byte" in str(check(report.path, gm, example(2, 4)))


@pytest.mark.parametrize("name", each(name for name in ENCODINGS if name not in BLOCKS))
def test_onnx_runtime_makes_no_block_product_of_other_encodings(
    files: Files, name: str, tmp_path: Path
) -> None:
    """DequantizeLinear(INT2) and MatMul would be fused into one that quantises activations in another way."""
    found = [node.op_type for node in optimised(files[name][1].path, tmp_path)]
    assert "MatMulNBits" not in found
    assert "DequantizeLinear" not in found or name == "float"


@pytest.mark.parametrize(("name", "block"), BLOCKS.items())
def test_block_products_are_what_is_fast(files: Files, name: str, block: int, tmp_path: Path) -> None:
    """Blocks of 16 or 256, or another accuracy level, take 20 times as long; the scale is one number in the file."""
    path = files[name][1].path
    products = [node for node in optimised(path, tmp_path) if node.op_type == "MatMulNBits"]
    assert len(products) == 4
    for node in products:
        options = {item.name: item.i for item in node.attribute}
        assert (options["bits"], options["block_size"], options["accuracy_level"]) == (2, block, 4)
    # constants are folded when the file is loaded: nothing is unpacked at each call
    assert "Expand" not in [node.op_type for node in optimised(path, tmp_path)]


@pytest.mark.parametrize("name", ["portable", "base3"])
def test_standard_operators_alone(files: Files, name: str) -> None:
    model = onnx.load(files[name][1].path)
    assert {node.domain for node in model.graph.node} == {""}
    assert all(
        value.data_type not in (onnx.TensorProto.INT2, onnx.TensorProto.INT4)
        for value in model.graph.initializer
    )
    versions = {entry.domain: entry.version for entry in model.opset_import}
    assert versions[""] == (18 if name == "portable" else 25)


@pytest.mark.parametrize("name", ["portable", "base3"])
def test_tables_stay_packed_in_memory(files: Files, name: str, tmp_path: Path) -> None:
    """A look-up reads packed rows: no float table is made, when the file is loaded or later."""
    optimised(files[name][1].path, tmp_path)
    kept = onnx.load(tmp_path / "optimised.onnx").graph.initializer
    floats = [value for value in kept if value.data_type == onnx.TensorProto.FLOAT]
    assert max(int(np.prod(value.dims)) for value in floats) <= ROWS


def test_portable_files_load_with_an_older_opset_and_ir(files: Files) -> None:
    model = onnx.load(files["portable"][1].path)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version <= 8


@pytest.mark.slow
def test_encodings_of_the_same_numerics_are_exported_from_each_other(files: Files, tmp_path: Path) -> None:
    """Nothing is quantised again, so nothing is to be allowed; the outputs are equal."""
    outputs = []
    gm, _ = files["int8-tensor"]
    for name in SAME_NUMERICS:
        report = to_onnx(gm, tmp_path / f"{name}.onnx", example(), encoding=name, opset=21)
        assert (report.encoding, report.requantized) == (name, None)
        check(report.path, gm, example())
        outputs.append(Runtime(report.path, threads=1)(example())["logits"])
    for value in outputs[1:]:
        np.testing.assert_array_equal(value, outputs[0])
    with pytest.raises(EncodingMismatch, match="'nbits2' was asked for"):
        to_onnx(gm, tmp_path / "other.onnx", example(), encoding="nbits2")


@pytest.mark.parametrize("trained", [*slow("float"), "nbits2"])
def test_requantised_files_say_what_it_cost(files: Files, trained: str, tmp_path: Path) -> None:
    gm, _ = files[trained]
    report = to_onnx(gm, tmp_path / "other.onnx", example(), encoding="base3", requantize=True)
    assert report.requantized is not None
    assert 1e-4 < report.requantized["logits"] < 0.1
    check(report.path, gm, example())


MIXED = {"first": "nbits2", "*.weight": "base3", "second": "float", "transposed": "int8-token"}


@pytest.mark.slow
def test_each_weight_has_its_own_encoding(tmp_path: Path) -> None:
    activations = QuantizeActivations(encodings=MIXED)
    gm = packed(activations)
    assert facts(gm).encodings == {
        "table.weight": "base3",
        "first.weight": "base3",  # the last that matches counts
        "second.weight": "float",
        "transposed": "int8-token",
    }
    report = to_onnx(gm, tmp_path / "mixed.onnx", example())
    assert report.encoding == "base3, second.weight=float, transposed=int8-token"
    found = [node.op_type for node in nodes_of(report.path)]
    assert (found.count("DynamicQuantizeLinear"), found.count("QuantizeLinear"), found.count("MatMul")) == (
        2,
        1,
        1,
    )
    check(report.path, gm, example())
    with pytest.raises(EncodingMismatch, match="the graph 'base3'"):
        check(report.path, packed(QuantizeActivations("base3")), example())
    with pytest.raises(EncodingMismatch, match="transposed=int8-token"):
        to_onnx(gm, tmp_path / "other.onnx", example(), encoding="base3")
    uniform = to_onnx(gm, tmp_path / "other.onnx", example(), encoding="nbits2", requantize=True)
    assert [node.op_type for node in nodes_of(uniform.path)].count("MatMulNBits") == 4


def test_readers_of_one_input_with_two_encodings_have_a_quantiser_each(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2)

        def forward(self, values: Tensor) -> Tensor:
            mixed: Tensor = self.out(torch.tanh(self.left(values)) * self.right(values))
            return mixed

    values = {"values": torch.randn(3, 64)}
    gm = ti_fx.capture(Two(), values)
    ti_fx.Pipeline(Ternarize(), QuantizeActivations())(gm)
    alone = ti_fx.dump(gm)
    ti_fx.Pipeline(QuantizeActivations(encodings={"left": "nbits2"}))(gm)
    mixed = ti_fx.dump(gm)
    assert mixed.count("int8_block_128(") == mixed.count("int8_tensor(") == 1
    ti_fx.Pipeline(QuantizeActivations(encodings={"left": "nbits2"}))(gm)
    assert ti_fx.dump(gm) == mixed
    ti_fx.Pipeline(QuantizeActivations())(gm)
    assert ti_fx.dump(gm) == alone
    ti_fx.Pipeline(QuantizeActivations(encodings={"left": "nbits2"}), Strip(), Pack())(gm)
    report = to_onnx(gm, tmp_path / "two.onnx", values)
    found = [node.op_type for node in nodes_of(report.path)]
    assert (found.count("MatMulNBits"), found.count("MatMulInteger")) == (1, 1)


def test_another_run_leaves_the_encoding_of_what_it_skips() -> None:
    gm = prepared(QuantizeActivations("int8-token"))
    ti_fx.Pipeline(QuantizeActivations("nbits2", skip=("first",)))(gm)
    assert facts(gm).encodings["first.weight"] == "int8-token"
    ti_fx.Pipeline(Strip(), Pack())(gm)
    assert str(encoding_of(gm)) == "nbits2, first.weight=int8-token"


def test_what_no_encoding_can_be_given_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"encodings='fist' matches no ternary weight.*first"):
        prepared(QuantizeActivations(encodings={"fist": "nbits2"}))
    with pytest.raises(InputError, match=r"unknown encoding .nbits3..*nbits2"):
        prepared(QuantizeActivations(encodings={"first": "nbits3"}))


@pytest.mark.slow
def test_several_encodings_are_set_before_an_intervention() -> None:
    from exported_models import bert, bert_example

    gm = ti_fx.capture(bert(), bert_example())
    mixed = QuantizeActivations(encodings={"*.key": "nbits2"})
    ti_fx.Pipeline(DuplicateTeacher(), Ternarize(), mixed)(gm)
    before = ti_fx.dump(gm)
    ti_fx.Pipeline(Intervene("output"), Intervene(None))(gm)
    assert ti_fx.dump(gm) == before
    ti_fx.Pipeline(Intervene("output"))(gm)
    with pytest.raises(PreconditionError, match="before intervene"):
        ti_fx.Pipeline(mixed)(gm)


def test_a_recipe_holds_several_encodings(tmp_path: Path) -> None:
    activations = QuantizeActivations("nbits2", encodings={"*.fc": "float", "a b": "base3"})
    assert str(activations) == 'quantize-activations{encoding=nbits2 encodings=*.fc:float,"a b:base3"}'
    for name in ("recipe.json", "recipe.yaml"):
        Recipe("mixed", activations=activations).save(tmp_path / name)
        assert Recipe.load(tmp_path / name).activations == activations
    written = json.loads((tmp_path / "recipe.json").read_text())
    assert written["activations"]["encodings"] == {"*.fc": "float", "a b": "base3"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base3", *slow("nbits2", "int8-tensor")])
def test_rows_that_end_within_a_byte(name: str, tmp_path: Path) -> None:
    """161 codes a row: GatherBlockQuantized and MatMulNBits read whole bytes, so the general rule applies."""
    gm = packed(QuantizeActivations(name), Model(161))
    report = to_onnx(gm, tmp_path / "odd.onnx", example())
    assert report.code_bits <= 2.001  # padding of the last byte
    assert {node.domain for node in nodes_of(report.path)} <= {"", "com.microsoft"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nbits2", pytest.param("portable", marks=pytest.mark.slow)])
def test_attention_is_quantised_in_every_encoding(name: str, tmp_path: Path) -> None:
    """The map's last dimension is dynamic, and of nbits2 shorter than a block."""
    from exported_models import bert, bert_example

    gm = ti_fx.capture(bert(), bert_example())
    ti_fx.Pipeline(Ternarize(), QuantizeActivations(name, attention=True), Strip(), Pack())(gm)
    report = to_onnx(gm, tmp_path / "attention.onnx", bert_example())
    assert report.parity.nodes is not None


@pytest.mark.slow
def test_what_is_kept_may_be_stored_in_half_the_bytes(tmp_path: Path) -> None:
    whole, gm = prepared(QuantizeActivations()), prepared(QuantizeActivations())
    ti_fx.Pipeline(Strip(), Pack())(whole)
    ti_fx.Pipeline(Strip(), Pack(kept="float16"))(gm)
    before = ti_fx.dump(gm)
    ti_fx.Pipeline(Pack(kept="float16"))(gm)
    assert ti_fx.dump(gm) == before
    expected = io.run_graph(whole, example())["logits"]
    distance = (io.run_graph(gm, example())["logits"] - expected).norm() / expected.norm()
    assert 0 < distance < 2e-2  # rounded by 5e-4, biases move activations over rounding boundaries
    report = to_onnx(gm, tmp_path / "half.onnx", example())
    stored = {value.name: value for value in onnx.load(report.path).graph.initializer}
    assert stored["packed.first.bias_half"].data_type == onnx.TensorProto.FLOAT16
    assert [name for name, value in stored.items() if value.data_type == 1 and value.dims] == [
        "packed.table.weight_scale"
    ]
    check(report.path, gm, example())


@pytest.mark.parametrize("name", ["base3", "portable"])
def test_the_encoding_says_how_what_is_kept_is_stored(name: str) -> None:
    """The point of base3 is size; every other encoding keeps what was trained to the bit, unless asked."""
    default, asked = prepared(QuantizeActivations(name)), prepared(QuantizeActivations(name))
    ti_fx.Pipeline(Strip(), Pack())(default)
    ti_fx.Pipeline(Strip(), Pack(kept="float16" if name == "portable" else "float32"))(asked)
    halved, whole = (default, asked) if name == "base3" else (asked, default)
    assert halved.get_buffer("packed.first.bias_half").dtype == torch.float16
    assert whole.get_parameter("first.bias").dtype == torch.float32
    assert "packed.first.bias_half" not in dict(whole.named_buffers())


def test_values_beyond_half_precision_are_kept() -> None:
    model = Model()
    with torch.no_grad():
        model.first.bias[0] = 1e6
    gm = prepared(QuantizeActivations(), model)
    ti_fx.Pipeline(Strip(), Pack(kept="float16"))(gm)
    assert gm.get_parameter("first.bias").dtype == torch.float32
    assert gm.get_buffer("packed.offset_half").dtype == torch.float16


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_hold_every_code(name: str) -> None:
    layout = LAYOUTS[name]
    for shape in ((7, 12), (5, 20), (3, 4)):
        codes = torch.randint(-1, 2, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
        stored = layout.encode(pack_codes(codes), shape)
        assert stored.dtype == torch.uint8
        assert stored.numel() == torch.Size(layout.stored(shape)).numel()
        padded = (
            shape[0] * -(-shape[1] // layout.per_byte)
            if layout.rows
            else -(-codes.numel() // layout.per_byte)
        )
        assert stored.numel() == padded
        assert torch.equal(layout.decode(stored, shape), codes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_two_bytes_hold_the_same_codes(name: str) -> None:
    table = LAYOUTS[name].table()
    ternary = [tuple(row.tolist()) for row in table if bool((row.abs() <= 1).all())]
    assert len(set(ternary)) == len(ternary) == 3 ** table.shape[1]


@pytest.mark.parametrize("name", each())
def test_one_wrong_byte_of_codes_is_found(files: Files, name: str, tmp_path: Path) -> None:
    gm, report = files[name]
    model = onnx.load(report.path)
    stored = max(model.graph.initializer, key=lambda value: len(value.raw_data))
    content = bytearray(stored.raw_data)
    content[100] ^= 1
    stored.raw_data = bytes(content)
    path = tmp_path / "damaged.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ParityError, match=r"packed\.table\.weight_codes"):
        check(path, gm, example())


@pytest.mark.parametrize("name", ["int8-tensor", "portable"])
def test_one_wrong_entry_of_the_table_of_codes_is_found(files: Files, name: str, tmp_path: Path) -> None:
    gm, report = files[name]
    model = onnx.load(report.path)
    table = next(one for one in model.graph.initializer if one.name.startswith("codes_of_"))
    values = onnx.numpy_helper.to_array(table).copy()
    values[242] *= -1  # which the example's rows need not use
    table.raw_data = values.tobytes()
    onnx.save(model, tmp_path / "table.onnx")
    with pytest.raises(ParityError, match=rf"table {table.name}, by which packed\..*is unpacked"):
        check(tmp_path / "table.onnx", gm, example())


@pytest.mark.slow
def test_biases_in_half_precision_suit_products_by_blocks(tmp_path: Path) -> None:
    gm = prepared(QuantizeActivations("nbits2"))
    ti_fx.Pipeline(Strip(), Pack(kept="float16"))(gm)
    report = to_onnx(gm, tmp_path / "half.onnx", example())
    assert "MatMulNBits" in [node.op_type for node in nodes_of(report.path)]
