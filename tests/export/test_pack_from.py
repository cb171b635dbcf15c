"""Weights that are read one by one: the same student, and never more than one of them in memory."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from exported_models import Layers, layers_example
from models import llama_model, text_example
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import LlamaForCausalLM

import ti_fx
from ti_fx.errors import InputError, PreconditionError
from ti_fx.export import ParityReport, compare, pack_from, to_onnx, with_cache
from ti_fx.export.lowered import lower
from ti_fx.passes import Pack, QuantizeActivations, Strip, Ternarize

CONFIG: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32}


@pytest.fixture(scope="module")
def ordinary() -> GraphModule:
    gm = ti_fx.capture(llama_model(**CONFIG), text_example())
    ti_fx.Pipeline(Ternarize(), QuantizeActivations(encoding="nbits2-32"), Strip(), Pack())(gm)
    return gm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    llama_model(**CONFIG).save_pretrained(path, max_shard_size="30KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def without_values() -> nn.Module:
    with init_empty_weights():
        return LlamaForCausalLM(llama_model(**CONFIG).config)


@pytest.fixture(scope="module")
def hollow() -> tuple[GraphModule, dict[str, Tensor]]:
    """A graph without values that is ready to be packed, and the model's buffers."""
    model = without_values()
    buffers = dict(model.named_buffers())
    gm = ti_fx.capture(model.to("meta"), text_example())
    ti_fx.Pipeline(Ternarize(), QuantizeActivations(encoding="nbits2-32"), Strip())(gm)
    return gm, buffers


def test_weights_read_one_by_one_give_the_same_file(
    ordinary: GraphModule,
    hollow: tuple[GraphModule, dict[str, Tensor]],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare, "all_of", lambda *arguments: ParityReport((), ""))
    gm, buffers = ti_fx.fork(hollow[0]), hollow[1]
    report = pack_from(gm, folder, buffers)
    assert str(folder) in str(report)
    assert ti_fx.dump(gm) == ti_fx.dump(ordinary)
    ti_fx.verify(gm)
    for name, student in (("one", ordinary), ("other", gm)):
        to_onnx(student, tmp_path / name / "student.onnx", text_example(), external_data=True)
    one, other = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "other")
    )
    assert len(one) == 2
    assert one == other


@pytest.mark.parametrize("kept", ["float32", "float16"])
def test_one_weight_is_in_memory_at_a_time(
    ordinary: GraphModule, hollow: tuple[GraphModule, dict[str, Tensor]], kept: Any
) -> None:
    gm, buffers = ti_fx.fork(hollow[0]), hollow[1]
    values = llama_model(**CONFIG).state_dict()
    alive: list[weakref.ref[Tensor]] = []

    def read(name: str) -> Tensor:
        assert not any(one() is not None for one in alive)
        value: Tensor = values[name].double()  # another type than the graph's
        alive.append(weakref.ref(value))
        return value

    pack_from(gm, buffers, read, kept=kept)
    assert len(alive) == len(values)
    expected = ti_fx.fork(ordinary)
    if kept == "float16":
        ti_fx.Pipeline(Pack(kept=kept))(expected)
    assert ti_fx.dump(gm) == ti_fx.dump(expected)
    state = expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in gm.state_dict().items())


@pytest.mark.slow
def test_a_model_without_values_gets_a_cache(
    ordinary: GraphModule, hollow: tuple[GraphModule, dict[str, Tensor]]
) -> None:
    gm, buffers = ti_fx.fork(hollow[0]), hollow[1]
    pack_from(gm, llama_model(**CONFIG).state_dict(), buffers)
    found = with_cache(gm, without_values().to("meta"), text_example())
    expected = with_cache(ordinary, llama_model(**CONFIG), text_example())
    assert ti_fx.dump(found.gm) == ti_fx.dump(expected.gm)
    values = found.gm(**expected.inputs)
    assert all(torch.equal(value, values[name]) for name, value in expected.gm(**expected.inputs).items())
    found.gm(**found.inputs)


def test_the_exporter_sees_no_codes(ordinary: GraphModule) -> None:
    lowered = lower(ordinary, 25)
    used = {str(node.target) for node in lowered.graph.find_nodes(op="get_attr")}
    codes = [value for name, value in lowered.named_buffers() if name in used and name.endswith("_codes")]
    assert codes
    assert all(value.untyped_storage().nbytes() == 1 for value in codes)


def test_weights_that_do_not_fit_are_refused(
    hollow: tuple[GraphModule, dict[str, Tensor]], folder: Path, tmp_path: Path
) -> None:
    gm, buffers = hollow
    before = ti_fx.dump(gm)
    name = "model.layers.0.mlp.up_proj.weight"
    short = dict(llama_model(**CONFIG).state_dict())
    up = short.pop(name)
    (tmp_path / "empty").mkdir()
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    next(damaged.glob("*.safetensors")).write_bytes(b"nothing")
    hostile = Path(shutil.copytree(folder, tmp_path / "hostile"))
    index = json.loads((hostile / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "../model.safetensors"
    (hostile / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model.safetensors.index.json").write_text("[]")
    (tmp_path / "index" / "a.safetensors").touch()
    for weights, message in (
        ((folder,), r"inv_freq has no values .* dict\(model.named_buffers\(\)\)"),
        ((short, buffers), rf"{name} has no values .* did you mean 'model.layers.0.mlp.gate_proj.weight'"),
        ((lambda name: short[name], buffers), f"{name} has no values"),
        (({**short, name: up[1:]}, buffers), rf"has {name} as torch.float32\[31, 32\], and .*\[32, 32\]"),
        (({**short, name: up.int()}, buffers), "as torch.int32"),
        ((tmp_path / "empty",), r"has no \*.safetensors"),
        ((tmp_path / "none",), r"has no \*.safetensors"),
        ((damaged, buffers), "can't read .*download it again"),
        ((hostile, buffers), "names '../model.safetensors', which is no file beside it"),
        ((tmp_path / "index",), "can't read .*index.json"),
        ((3,), "weights is a int"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            pack_from(gm, *weights)
        assert "\n" not in str(raised.value)
        assert ti_fx.dump(gm) == before
        assert all(parameter.is_meta for parameter in gm.parameters())


def test_only_a_ternary_student_is_packed() -> None:
    with pytest.raises(PreconditionError, match="run ternarize first"):
        pack_from(ti_fx.capture(Layers(), layers_example()), {})
