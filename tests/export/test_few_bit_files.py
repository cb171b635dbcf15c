"""Activations of few bits: what is trained is what the file computes, as integers where ONNX Runtime can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from exported_models import VOCABULARY, Layers, bert, bert_example, layers_example, packed
from grids import FEW_BITS
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ti_fx
from ti_fx.errors import ExportError
from ti_fx.export import Runtime, check, to_onnx
from ti_fx.export import inputs as io
from ti_fx.export.compare import outputs, whole_file
from ti_fx.export.compare.nodes import compare_nodes
from ti_fx.export.report import NodeReport
from ti_fx.numerics.encodings import get_encoding
from ti_fx.passes.lower.choose_layouts import ChooseLayouts
from ti_fx.passes.lower.multiply_integers import MultiplyIntegers

QUICK = ("int4-tensor", "int2-token-asymmetric", "int4-block-32")


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def optimised(path: Path, folder: Path) -> onnx.GraphProto:
    """Return the graph that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx").graph


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FEW_BITS]
)
def test_a_file_computes_what_was_trained(name: str, tmp_path: Path) -> None:
    gm = packed(Layers().eval(), layers_example(), name)
    bits = name.partition("-")[0]
    assert f"%values_{bits} = {name.replace('-', '_')}(%values)" in ti_fx.dump(gm)
    report = to_onnx(gm, tmp_path / "student.onnx", layers_example())
    assert (report.encoding, report.batch_invariant) == (name, "tensor" not in name)
    assert report.parity.nodes is not None
    assert report.parity.nodes.worst < 1e-5
    check(report.path, gm, layers_example())
    assert operators(report.path).count("MatMulInteger") == (0 if "block" in name else 2)
    if name.endswith(
        "token-asymmetric"
    ):  # the sums of the weights' columns are constants once the file is loaded
        graph = optimised(report.path, tmp_path)
        assert "ReduceSum" not in [node.op_type for node in graph.node]
        sums = [value for value in graph.initializer if value.data_type == onnx.TensorProto.INT32]
        assert sorted(value.dims[0] for value in sums if value.dims) == [16, 24]
    runtime = Runtime(report.path, threads=1)
    for batch in (1, 5):
        found = torch.from_numpy(runtime(layers_example(batch))["logits"])
        expected = io.run_graph(gm, layers_example(batch))["logits"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if get_encoding(name).batch_invariant:
        whole = torch.from_numpy(runtime(layers_example(5))["logits"])
        alone = torch.from_numpy(runtime({"values": layers_example(5)["values"][3:4]})["logits"])
        torch.testing.assert_close(alone[0], whole[3], rtol=1e-5, atol=1e-6)


def test_readers_of_one_value_with_other_bits_have_codes_of_their_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right, self.also = nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 16)
            self.out = nn.Linear(16, 2)

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            mixed: torch.Tensor = self.out(self.left(values) * self.right(values) + self.also(values))
            return mixed

    example = {"values": torch.randn(3, 32, generator=torch.Generator().manual_seed(0))}
    others = {"left": "int4-token", "also": "int4-token"}
    gm = packed(Two().eval(), example, "int8-token", encodings=others)
    ti_fx.Pipeline(ChooseLayouts(), MultiplyIntegers())(gm)
    lowered = ti_fx.dump(gm)
    assert lowered.count("= quantise_token(%values)") == lowered.count("= quantise_token(%values, 4)") == 1
    assert lowered.count("= integer_linear(") == 3


@pytest.mark.slow
def test_a_packed_student_is_given_fewer_bits_by_name(tmp_path: Path) -> None:
    gm = packed(Layers().eval(), layers_example(), "int8-token")
    report = to_onnx(gm, tmp_path / "four.onnx", layers_example(), encoding="int4-token", requantize=True)
    assert report.requantized is not None
    assert 0.01 < report.requantized["logits"] < 0.5
    check(report.path, gm, layers_example())


def test_tokens_need_opset_21_where_codes_are_multiplied(tmp_path: Path) -> None:
    gm = packed(Layers().eval(), layers_example(), "int4-token-asymmetric")
    with pytest.raises(
        ExportError, match=r"%values_int4 needs opset 21 or newer, and opset=18 was asked for"
    ):
        to_onnx(gm, tmp_path / "old.onnx", layers_example(), opset=18)


def test_where_a_last_bit_moves_outputs_far_nodes_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bits in a deep untrained network do that; here, any noise counts as such."""
    for name in ("QUANTISED_TOLERANCE", "NOISE_CAP", "UNSTEADY"):
        monkeypatch.setattr(outputs, name, -1.0)
    monkeypatch.setattr(outputs, "NOISE_FACTOR", 1e9)
    compared: list[dict[str, torch.Tensor]] = []

    def counted(file: Any, student: Any, inputs: dict[str, torch.Tensor]) -> NodeReport:
        compared.append(inputs)
        return compare_nodes(file, student, inputs)

    monkeypatch.setattr(whole_file, "compare_nodes", counted)
    gm = packed(Layers().eval(), layers_example(), "int2-token")
    report = to_onnx(gm, tmp_path / "student.onnx", layers_example())
    assert report.parity.differences == ()
    assert all("last-bit noise within PyTorch moves 'logits' by" in case for case in report.parity.skipped)
    assert len(compared) == 1 + len(report.parity.skipped) > 2


@pytest.mark.slow
def test_two_bits_in_a_deep_untrained_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    model.train(False)
    gm = packed(model, bert_example(), "int2-tensor")
    report = to_onnx(gm, tmp_path / "student.onnx", bert_example())
    assert report.parity.nodes is not None
    assert report.parity.nodes.worst < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW_BITS)
def test_attention_is_quantised_too(name: str, tmp_path: Path) -> None:
    """The map's last dimension is dynamic, and shorter than a block."""
    gm = packed(bert(), bert_example(), name, attention=True)
    report = to_onnx(gm, tmp_path / "attention.onnx", bert_example())
    assert report.parity.nodes is not None
