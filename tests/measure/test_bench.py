"""``ti-fx bench``: files side by side, with the original model beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from classifier import ti_fx_command
from models import llama_model, t5_model

from ti_fx.errors import InputError
from ti_fx.export import Runtime
from ti_fx.measure.bench import bench, made_up


def identity(path: Path, name: str) -> Path:
    """Write a file by someone else that returns its input, whose sizes have names of their own."""
    value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", "s1"])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", [name], ["y"])], "g", [value], [result])
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


def test_a_student_is_measured_beside_its_original(onnx_file: Path, classifier: Path) -> None:
    sizes = ("--batch", 1, "--batch", 2, "--length", 6, "--rounds", 2, "--threads", 1)
    ran = ti_fx_command("bench", onnx_file, "--against", classifier, *sizes, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert list(found["bytes"]) == [str(onnx_file), "fp32", "ORT int8"]
    assert found["bytes"][str(onnx_file)] == onnx_file.stat().st_size < found["bytes"]["fp32"]
    assert [(row["batch"], row["length"]) for row in found["times"]] == [(1, 6), (2, 6)]
    assert all(taken > 0 for row in found["times"] for taken in row["milliseconds"].values())
    assert all(one["load_milliseconds"] > 0 and one["megabytes"] > 0 for one in found["footprints"].values())
    assert not found["decodes"]


def test_files_of_anyone_are_measured(tmp_path: Path) -> None:
    file = identity(tmp_path / "x.onnx", "x")
    ran = ti_fx_command("bench", file, "--batch", 3, "--length", 4, "--rounds", 1)
    assert (ran.code, ran.err) == (0, "")
    assert f"over {file}" in ran.out
    assert made_up(Runtime(file).inputs, 3, 4)["x"].shape == (3, 4)


@pytest.mark.slow  # a decoder is exported twice
def test_of_a_file_with_a_cache_one_token_is_run(tmp_path: Path) -> None:
    llama_model(num_hidden_layers=1).save_pretrained(tmp_path / "llama")
    file = tmp_path / "llama.onnx"
    assert ti_fx_command("export", tmp_path / "llama", "--out", file, "--ternarize", "--cache").code == 0
    feed = made_up(Runtime(file).inputs, 2, 7)
    assert {name: feed[name].shape[:2] for name in ("input_ids", "attention_mask")} == {
        "input_ids": (2, 1),
        "attention_mask": (2, 8),
    }
    assert feed["past_key_0"].shape[2] == 7
    assert np.all(feed["attention_mask"] == 1)
    ran = ti_fx_command("bench", file, "--against", tmp_path / "llama", "--batch", 1, "--length", 7)
    assert (ran.code, ran.err) == (0, "")
    assert "tokens/s" in ran.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", 0), "--batch is 0; give 1 or more"),
        (("--length", 4000), "and the model takes at most"),
        (("none.onnx",), "there is no file none.onnx"),
        (("OTHER",), "takes x, and"),
    ],
)
def test_what_can_not_be_measured_is_one_line(
    onnx_file: Path,
    arguments: tuple[object, ...],
    message: str,
    tmp_path: Path,
    run: Callable[..., tuple[int, str, str]],
) -> None:
    other = identity(tmp_path / "other.onnx", "x")
    code, out, err = run("bench", onnx_file, *(other if one == "OTHER" else one for one in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_an_encoder_decoders_parts_have_no_original(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    t5_model(num_layers=1).save_pretrained(tmp_path / "t5")
    file = identity(tmp_path / "x.onnx", "past_key_0")
    code, _, err = run("bench", file, "--against", tmp_path / "t5")
    assert (code, err.count("\n")) == (2, 1)
    assert "--against takes encoders and causal models" in err


def test_inputs_that_can_not_be_made_up_are_refused(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("words", onnx.TensorProto.STRING, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.STRING, None)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["words"], ["y"])], "g", [value], [result]
    )
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "x.onnx")
    with pytest.raises(InputError, match=r"input 'words' is a tensor"):
        bench({"x": tmp_path / "x.onnx"}, rounds=1)
