"""What is saved beside a file is tied to it: no file answers with another's labels, and nothing else is replaced."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from classifier import ti_fx_command, tokenizer
from exported_models import without_record
from models import bert_model, text_example
from torch.fx import GraphModule

import ti_fx
from ti_fx.errors import InputError
from ti_fx.export import compare, pipeline, to_onnx, writer
from ti_fx.export.report import ParityReport
from ti_fx.passes import Pack, QuantizeActivations, Ternarize

Export = Callable[..., Path]


@pytest.fixture(scope="module")
def student() -> GraphModule:
    gm = ti_fx.capture(bert_model(layers=1).train(False), text_example(batch=2))
    ti_fx.Pipeline(Ternarize(min_rows=32), QuantizeActivations("int8-token"), Pack())(gm)
    return gm


@pytest.fixture(scope="module")
def traced(student: GraphModule) -> Any:
    """What the exporter makes of it."""
    return writer.onnx_model(student, text_example(batch=2), 25)


@pytest.fixture
def export(student: GraphModule, traced: Any, monkeypatch: pytest.MonkeyPatch) -> Export:
    """An export that is quick: the trace was made, and nothing is compared."""
    monkeypatch.setattr(writer, "onnx_model", lambda *arguments: traced.clone())
    monkeypatch.setattr(compare, "all_of", lambda *arguments: ParityReport((), ""))

    def run(path: Path, *labels: str, **parts: Any) -> Path:
        config = copy.deepcopy(bert_model(layers=1).config)
        config.id2label = dict(enumerate(labels))
        to_onnx(student, path, text_example(batch=2), config=config, **({"tokenizer": tokenizer()} | parts))
        return path

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_second_file_replaces_nothing_of_the_first(tmp_path: Path, export: Export) -> None:
    first = export(tmp_path / "first.onnx", "sport", "politics", "art")
    answer = pipeline(first)("how many w7")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"config\.json belongs to first\.onnx.*a folder of its own"):
        export(tmp_path / "second.onnx", "cat", "dog", "cow")
    assert contents(tmp_path) == before
    assert pipeline(first)("how many w7") == answer
    export(tmp_path / "small.onnx", "sport", "politics", "art")  # what both have is equal
    with pytest.raises(InputError, match=r"config\.json belongs to small\.onnx"):
        export(first, "cat", "dog", "cow")


def test_a_file_is_exported_again_with_what_goes_with_it(tmp_path: Path, export: Export) -> None:
    path = export(tmp_path / "student.onnx", "sport", "politics", "art")
    export(path, "cat", "dog", "cow")
    assert pipeline(path)("how many w7")[0]["label"] in ("cat", "dog", "cow")
    without_record(path)
    export(path, "one", "two", "three")  # of an older ti_fx, and alone in its folder
    assert pipeline(path)("how many w7")[0]["label"] in ("one", "two", "three")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_of_somebody_else_stays(tmp_path: Path, export: Export, name: str) -> None:
    (tmp_path / name).write_text('{"mine": true}')
    with pytest.raises(InputError, match=f"{name} was not exported with student.onnx.*a folder of its own"):
        export(tmp_path / "student.onnx", "sport", "politics", "art")
    assert contents(tmp_path) == {name: b'{"mine": true}'}


def test_only_what_was_exported_with_a_file_is_read(tmp_path: Path, export: Export) -> None:
    path = export(tmp_path / "student.onnx", "sport", "politics", "art", tokenizer=None)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"the tokenizer_config\.json beside .* was not exported with it"):
        pipeline(path)
    config = tmp_path / "config.json"
    config.write_bytes(config.read_bytes().replace(b"sport", b"spore"))
    with pytest.raises(InputError, match=r"config\.json beside .* is not the one that was exported with it"):
        pipeline(path)
    config.unlink()
    with pytest.raises(InputError, match=r"there is no config\.json beside .*config=model\.config"):
        pipeline(path)


def test_a_file_that_came_there_later_changes_no_tokens(tmp_path: Path, export: Export) -> None:
    path = export(tmp_path / "student.onnx", "sport", "politics", "art")
    answer = pipeline(path)("how many w7")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "w7"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"how many": 5}))
    assert pipeline(path)("how many w7") == answer


def test_files_of_an_older_version_load_where_it_is_clear_whose_is_what(
    tmp_path: Path, export: Export
) -> None:
    path = export(tmp_path / "student.onnx", "sport", "politics", "art")
    without_record(path)
    assert pipeline(path)("how many w7")[0]["label"] in ("sport", "politics", "art")
    export(tmp_path / "other.onnx", "sport", "politics", "art")
    with pytest.raises(InputError, match=r"does not say which files beside it are its own"):
        pipeline(path)


def test_the_command_refuses_before_it_computes(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "shared" / "student.onnx"
    bert_model(layers=1).save_pretrained(model)
    (model / "model.safetensors").write_bytes(b"never read")
    out.parent.mkdir()
    (out.parent / "config.json").write_text("{}")
    ran = ti_fx_command("export", model, "--ternarize", "--out", out)
    assert ran.code == 2
    assert "config.json was not exported with student.onnx" in ran.err
    assert contents(out.parent) == {"config.json": b"{}"}
