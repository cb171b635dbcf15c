"""What a user gives to ``ti_fx.export``: each wrong kind of argument is one line that says what to give."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import Layers, layers_example, packed
from models import text_example
from torch.fx import GraphModule
from transformers import BertConfig

from ti_fx.errors import InputError
from ti_fx.export import Runtime, check, pipeline, to_onnx
from ti_fx.files import atomic_files, atomic_path
from ti_fx.measure import choose_encoding


@pytest.fixture(scope="module")
def layers() -> GraphModule:
    return packed(Layers(), layers_example())


@pytest.fixture(scope="module")
def layers_file(layers: GraphModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(layers, tmp_path_factory.mktemp("arguments") / "layers.onnx", layers_example()).path


def assert_refused(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {}}, "config is a dict; give the object of transformers"),
        ({"config": BertConfig}, "config is a type; give the object of transformers"),
        ({"tokenizer": "folder"}, "tokenizer is a str; give the object"),
        ({"processor": 3}, "processor is a int; give the object"),
        ({"generation_config": {"top_k": 3}}, "generation_config is a dict; give the object"),
        ({"ram_megabytes": -1}, "ram_megabytes is -1; give a number from 0 on"),
        ({"ram_megabytes": float("nan")}, "ram_megabytes is nan; give"),
        ({"ram_megabytes": "8"}, "ram_megabytes is '8'; give"),
        ({"ram_megabytes": True}, "ram_megabytes is True; give"),
        ({"size_threshold": 1.5}, "size_threshold is 1.5; give a whole number, at least 0"),
        ({"size_threshold": None}, "size_threshold is None; give"),
        ({"external_data": "yes"}, "external_data is 'yes'; give True, False or None"),
        ({"requantize": 1}, "requantize is 1; give True or False"),
        ({"opset": "21"}, "opset is '21'; use 18 to 25"),
        ({"opset": 21.0}, "opset is 21.0; use 18 to 25"),
        ({"encoding": 3}, "unknown encoding 3; known: int8-tensor"),
        ({"encoding": ["float"]}, r"unknown encoding \['float'\]"),
    ],
)
def test_an_option_of_another_kind_is_refused(
    options: dict[str, Any], message: str, layers: GraphModule, tmp_path: Path
) -> None:
    path = tmp_path / "student.onnx"
    assert_refused(message, lambda: to_onnx(layers, path, layers_example(), **options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "path is None; give a str or a pathlib.Path"),
        (3, "path is 3; give a str"),
        (b"student.onnx", "path is b'student.onnx'; give a str"),
        ("a\0b.onnx", "can't use the path .*zero byte"),
        ("\udcff.onnx", "can't use the path .*no text in UTF-8"),
        ("x" * 300, "can't use the path 'x+': File name too long"),
        ("a\nb.onnx", r"the path 'a\\nb.onnx' holds a line break"),
    ],
)
def test_what_is_no_path_is_refused_wherever_one_is_taken(
    path: Any, message: str, layers: GraphModule
) -> None:
    for call in (
        lambda: to_onnx(layers, path, layers_example()),
        lambda: check(path, layers, layers_example()),
        lambda: Runtime(path),
        lambda: pipeline(path),
    ):
        assert_refused(message, call)


@pytest.mark.parametrize("gm", [None, "student", Layers()], ids=["none", "text", "model"])
def test_what_is_no_graph_is_refused(gm: Any, layers_file: Path, tmp_path: Path) -> None:
    for call in (
        lambda: to_onnx(gm, tmp_path / "student.onnx", layers_example()),
        lambda: check(layers_file, gm, layers_example()),
        lambda: choose_encoding(gm, layers_example()),
    ):
        assert_refused(r"gm is a \w+; give the graph that ti_fx.capture returned", call)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (None, "the inputs are a NoneType; give a dict of tensors by name"),
        (3, "the inputs are a int; give a dict"),
        ({1: torch.ones(2)}, "takes the inputs values, and the example has 1"),
        (
            {"values": torch.ones(3, 5, 16, device="meta")},
            "input 'values' is torch.strided on meta; give a dense",
        ),
        (
            {"values": torch.ones(3, 5, 16).to_sparse()},
            "input 'values' is torch.sparse_coo on cpu; give a dense",
        ),
        (
            {"values": torch.ones(3, 5, 16).half()},
            "input 'values' is torch.float16; the graph was captured with",
        ),
        ({"values": torch.ones(5, 16)}, "input 'values' has 2 dimensions; the graph takes 3"),
    ],
)
def test_what_is_no_example_is_refused(
    example: Any, message: str, layers: GraphModule, layers_file: Path, tmp_path: Path
) -> None:
    assert_refused(message, lambda: to_onnx(layers, tmp_path / "student.onnx", example))
    assert_refused(message, lambda: check(layers_file, layers, example))


def test_a_list_of_tensors_is_taken_in_order(layers: GraphModule, layers_file: Path) -> None:
    assert check(layers_file, layers, list(layers_example().values())).nodes  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", ["2", 0, -1, True, 1.5, float("nan"), 2**40, [1]])
def test_what_is_no_number_of_threads_is_refused(
    threads: Any, layers_file: Path, layers: GraphModule
) -> None:
    for call in (
        lambda: Runtime(layers_file, threads),
        lambda: pipeline(layers_file, threads=threads),
        lambda: choose_encoding(layers, layers_example(), threads=threads),
    ):
        assert_refused("threads is .*; give at least 1, or None for one per core", call)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 1.5}, "rounds is 1.5; give a whole number, at least 1"),
        ({"rounds": "3"}, "rounds is '3'; give a whole number"),
        ({"ram_megabytes": "5"}, "ram_megabytes is '5'; give a number"),
        ({"candidates": None}, "candidates is None; give at least one encoding in a list"),
        ({"candidates": (3,)}, "unknown encoding 3; known"),
    ],
)
def test_what_can_not_be_chosen_from_is_refused(
    options: dict[str, Any], message: str, layers: GraphModule
) -> None:
    assert_refused(message, lambda: choose_encoding(layers, layers_example(), **options))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "the inputs are a NoneType; give a dict of arrays or tensors by name: values"),
        ([torch.ones(3, 5, 16)], "the inputs are a list; give a dict"),
        ({"values": [[1.0], [2.0, 3.0]]}, "input 'values' can't be made an array: setting an array element"),
        ({"values": torch.ones(3, 5, 16, device="meta")}, "input 'values' can't be made an array"),
        ({"values": torch.ones(3, 5, 16).bfloat16()}, "input 'values' can't be made an array"),
    ],
)
def test_what_a_file_does_not_take_is_refused(inputs: Any, message: str, layers_file: Path) -> None:
    assert_refused(message, lambda: Runtime(layers_file)(inputs))


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_an_id_beyond_its_table_is_named(wrong: int, onnx_file: Path) -> None:
    """ONNX Runtime would count -1 from the table's end, and PyTorch refuses it."""
    example = text_example()
    example["input_ids"][1, 2] = wrong
    assert_refused(
        rf"input 'input_ids' is {wrong} at \[1, 2\]; give ids from 0 to", lambda: Runtime(onnx_file)(example)
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes")
def test_a_device_or_a_pipe_is_neither_replaced_nor_waited_for(layers: GraphModule, tmp_path: Path) -> None:
    """A rename would put a file in the place of /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for write in (atomic_path, atomic_files):
        with pytest.raises(InputError, match="a pipe or a socket, which no file may replace"), write(pipe):
            pass
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert_refused("is no file; export one", lambda: check(pipe, layers, layers_example()))
    assert list(tmp_path.iterdir()) == [pipe]
