"""Errors planted in an exported file: each is found, and the node where it is made is named."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.errors import InputError, ParityError
from ti_fx.export import check, to_onnx
from ti_fx.export.compare import whole_file
from ti_fx.export.compare.nodes import compare_nodes
from ti_fx.export.file.content import open_file
from ti_fx.export.file.digests import RECORD_KEY
from ti_fx.ir.text import module_path
from ti_fx.passes import Pack, QuantizeActivations, Strip, Ternarize

EACH = 8  # errors of each kind


class Block(nn.Module):
    """Causal attention with a stored mask, and a feed-forward block."""

    def __init__(self, width: int = 32, heads: int = 2, length: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 64), nn.Linear(64, width)
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        for layer in (self.query, self.key, self.value, self.output, self.up, self.down):
            nn.init.normal_(layer.bias, std=0.5)
        self.register_buffer("mask", torch.full((length, length), -1e4).triu(1))
        self.mask: Tensor

    def split(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        return hidden.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = (self.split(layer(hidden)) for layer in (self.query, self.key, self.value))
        length = hidden.shape[1]
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + self.mask[:length, :length]
        context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        hidden = self.attention_norm(hidden + self.output(context))
        result: Tensor = self.norm(hidden + self.down(nn.functional.gelu(self.up(hidden))))
        return result


class Decoder(nn.Module):
    """Two blocks with a table and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(1100, 32)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(32, 5)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        hidden = self.table(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return {"logits": self.head(hidden)}


@dataclass(frozen=True)
class Exported:
    """A file that agrees with its graph."""

    gm: GraphModule
    path: Path
    example: dict[str, Tensor]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    example = {"input_ids": torch.randint(0, 1100, (3, 8), generator=torch.Generator().manual_seed(1))}
    gm = ti_fx.capture(Decoder().eval(), example)
    ti_fx.Pipeline(Ternarize(), QuantizeActivations(), Strip(), Pack())(gm)
    path = tmp_path_factory.mktemp("located") / "decoder.onnx"
    report = to_onnx(gm, path, example)
    assert report.parity.nodes is not None
    assert report.parity.nodes.nodes > 20
    return Exported(gm, path, example)


Plant = Callable[[onnx.ModelProto, Exported, random.Random], str]


def stored(
    model: onnx.ModelProto, choose: Callable[[onnx.TensorProto], bool], dice: random.Random
) -> onnx.TensorProto:
    found: onnx.TensorProto = dice.choice([value for value in model.graph.initializer if choose(value)])
    return found


def reader(model: onnx.ModelProto, gm: GraphModule, start: str) -> str:
    """Follow a value forward to the first that is a node of the graph."""
    names = {node.name for node in gm.graph.nodes} | {"logits"}
    reached = {start}
    for node in model.graph.node:
        if reached & set(node.input):
            found = names & set(node.output)
            if found:
                return found.pop()
            reached |= set(node.output)
    raise AssertionError(start)


def trit(model: onnx.ModelProto, exported: Exported, dice: random.Random) -> str:
    tensor = stored(model, lambda value: value.data_type == onnx.TensorProto.INT2, dice)
    content = bytearray(tensor.raw_data)
    place = dice.randrange(len(content))
    content[place] ^= 1 if content[place] & 3 in (0, 1) else 3  # 0 and 1 change places, -1 becomes 0
    tensor.raw_data = bytes(content)
    return reader(model, exported.gm, tensor.name)


def changed(model: onnx.ModelProto, exported: Exported, tensor: onnx.TensorProto, dice: random.Random) -> str:
    """Move one element to the next number."""
    array = onnx.numpy_helper.to_array(tensor).copy()
    place = dice.randrange(array.size)
    array.reshape(-1)[place] = np.nextafter(array.reshape(-1)[place], np.float32(np.inf))
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return reader(model, exported.gm, tensor.name)


def scale(model: onnx.ModelProto, exported: Exported, dice: random.Random) -> str:
    return changed(model, exported, stored(model, lambda value: value.name.endswith("_scale"), dice), dice)


def bias(model: onnx.ModelProto, exported: Exported, dice: random.Random) -> str:
    return changed(model, exported, stored(model, lambda value: value.name.endswith(".bias"), dice), dice)


def mask(model: onnx.ModelProto, exported: Exported, dice: random.Random) -> str:
    return changed(model, exported, stored(model, lambda value: value.name.endswith(".mask"), dice), dice)


def edge(model: onnx.ModelProto, exported: Exported, dice: random.Random) -> str:
    """Let a node read another node of the same shape that comes before it."""
    shapes = {
        node.name: (str(value.dtype), *map(str, value.shape))
        for node in exported.gm.graph.nodes
        if isinstance(value := node.meta.get("val"), Tensor) and value.is_floating_point()
    }
    possible = []
    earlier: list[str] = []
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            others = [other for other in earlier if other != name and shapes.get(other) == shapes.get(name)]
            if name in shapes and others and node.op_type != "DynamicQuantizeLinear":
                possible.append((node, index, others))
        earlier += [name for name in node.output if name in shapes]
    node, index, others = dice.choice(possible)
    node.input[index] = dice.choice(others)
    owner = node.output[0]
    return owner if owner in shapes or owner == "logits" else reader(model, exported.gm, owner)


@pytest.mark.parametrize("seed", range(EACH))
@pytest.mark.parametrize("plant", [trit, scale, bias, mask, edge])
def test_a_planted_error_is_located_to_its_node(
    plant: Plant, seed: int, exported: Exported, tmp_path: Path
) -> None:
    model = onnx.load(exported.path)
    place = plant(model, exported, random.Random(seed))
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(model.SerializeToString())
    assert_located(place, exported.gm, lambda: check(damaged, exported.gm, exported.example))
    if plant is edge:  # by the numbers alone, as in a file that the exporter got wrong
        assert_located(
            place, exported.gm, lambda: compare_nodes(open_file(damaged), exported.gm, exported.example)
        )


def assert_located(place: str, gm: GraphModule, compare: Callable[[], object]) -> None:
    with pytest.raises(ParityError) as error:
        compare()
    node = next((node for node in gm.graph.nodes if node.name == place), None)
    if node is None:  # the output has the model's name
        (node,) = gm.graph.output_node().all_input_nodes
    assert f"%{node.name} " in str(error.value), place
    path = module_path(node)
    assert path in str(error.value)
    if path.startswith("layers."):
        assert f"layer {path.split('.')[1]}" in str(error.value)


def operator(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(node for node in model.graph.node if node.op_type == kind)
    return found


def epsilon(model: onnx.ModelProto) -> str:
    """Too small a change for any comparison of numbers."""
    node = operator(model, "LayerNormalization")
    (found,) = (attribute for attribute in node.attribute if attribute.name == "epsilon")
    found.f *= 1.0001
    return str(node.output[0])


def without_epsilon(model: onnx.ModelProto) -> str:
    node = operator(model, "LayerNormalization")
    del node.attribute[:]
    return str(node.output[0])


def another_operator(model: onnx.ModelProto) -> str:
    node = operator(model, "Gelu")
    node.op_type = "Relu"
    return str(node.output[0])


def no_operator(model: onnx.ModelProto) -> str:
    node = operator(model, "Gelu")
    place = str(node.output[0])
    model.graph.node.remove(node)
    return place


def another_shape(model: onnx.ModelProto) -> str:
    bias = next(value for value in model.graph.initializer if value.name == "layers.1.up.bias")
    bias.dims[0] += 1
    return "linear_10"


def another_type(model: onnx.ModelProto) -> str:
    scale = next(
        value for value in model.graph.initializer if value.name.endswith("layers.1.up.weight_scale")
    )
    scale.data_type = onnx.TensorProto.INT32
    return "linear_10"


@pytest.mark.parametrize(
    "change", [epsilon, without_epsilon, another_operator, no_operator, another_shape, another_type]
)
def test_what_no_number_shows_or_nobody_can_run_is_located_by_the_record(
    change: Callable[[onnx.ModelProto], str], exported: Exported, tmp_path: Path
) -> None:
    model = onnx.load(exported.path)
    place = change(model)
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(model.SerializeToString())
    assert_located(place, exported.gm, lambda: check(changed, exported.gm, exported.example))


def more_outputs(model: onnx.ModelProto) -> None:
    model.graph.output.append(onnx.helper.make_tensor_value_info("input_ids", 7, ["batch", "sequence"]))


def fix_inputs(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3


def older_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version -= 1


def other_metadata(model: onnx.ModelProto) -> None:
    next(entry for entry in model.metadata_props if entry.key == "ti_fx.minimum_onnxruntime").value = "1.2"


def another_constant(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.helper.make_tensor("more", 1, [1], [0.0]))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (more_outputs, "outputs"),
        (fix_inputs, "inputs"),
        (older_opset, "opsets"),
        (other_metadata, "metadata"),
        (another_constant, "constants"),
    ],
)
def test_a_part_that_is_no_node_is_named(
    change: Callable[[onnx.ModelProto], None], part: str, exported: Exported, tmp_path: Path
) -> None:
    model = onnx.load(exported.path)
    change(model)
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(model.SerializeToString())
    with pytest.raises(ParityError, match=rf"^the file's {part} are not those that were written"):
        check(changed, exported.gm, exported.example)


def test_what_others_note_in_the_metadata_is_theirs(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported.path)
    entry = model.metadata_props.add()
    entry.key, entry.value = "deployed", "today"
    noted = tmp_path / "noted.onnx"
    noted.write_bytes(model.SerializeToString())
    check(noted, exported.gm, exported.example)


def test_a_file_without_a_record_is_refused(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported.path)
    kept = [entry for entry in model.metadata_props if entry.key != RECORD_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=rf"{RECORD_KEY} is missing or damaged, .*; export it again"):
        check(changed, exported.gm, exported.example)


def test_an_error_that_only_other_sizes_show_is_located(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a file that the exporter got wrong, whose constants nobody can tell apart."""
    for name in ("compare_digests", "compare_constants"):
        monkeypatch.setattr(whole_file, name, lambda content, gm: 0)
    model = onnx.load(exported.path)
    mask = next(value for value in model.graph.initializer if value.name.endswith(".mask"))
    array = onnx.numpy_helper.to_array(mask).copy()
    array[8:] = -array[8:]  # the example has eight tokens
    mask.CopyFrom(onnx.numpy_helper.from_array(array, mask.name))
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(model.SerializeToString())
    place = reader(model, exported.gm, mask.name)
    assert_located(place, exported.gm, lambda: check(changed, exported.gm, exported.example))


def test_a_node_that_can_not_be_run_is_named(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported.path)
    node = operator(model, "LayerNormalization")
    node.input[1], node.input[0] = node.input[0], node.input[1]
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(model.SerializeToString())
    assert_located(
        node.output[0], exported.gm, lambda: compare_nodes(open_file(changed), exported.gm, exported.example)
    )


def test_the_file_itself_passes(exported: Exported) -> None:
    report = check(exported.path, exported.gm, exported.example)
    assert report.nodes is not None
    assert report.nodes.worst < 1e-6
    assert "compared one by one" in str(report)


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    gm = ti_fx.capture(Decoder().eval(), exported.example)
    ti_fx.Pipeline(Ternarize(), QuantizeActivations(), Strip(), Pack())(gm)
    report = to_onnx(gm, tmp_path / "again.onnx", exported.example)
    assert report.path.read_bytes() == exported.path.read_bytes()
