"""Whatever a user gets wrong: one line that says what, where and what to do, exit code 2, and no file harmed."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier import ROWS, Train, write_rows
from models import PlainTransformer, Tiny, bert_model, prepared, text_example
from refusals import NoAttention, assert_one_line, contents, refused, without_attention
from torch import Tensor, nn

import ti_fx
from ti_fx import Pipeline, Recipe
from ti_fx.errors import TiFxError
from ti_fx.export import Runtime, check, to_onnx
from ti_fx.passes import DecomposeAttention, Intervene, Pack, Strip, Ternarize

Example = dict[str, Tensor]

# --- inputs of another shape or dtype --------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Example], Example]] = {
    "dtype": lambda example: {**example, "input_ids": example["input_ids"].float()},
    "rank": lambda example: {**example, "input_ids": example["input_ids"][None]},
    "sizes": lambda example: {**example, "attention_mask": example["attention_mask"][:2]},
    "names": lambda example: {"ids": example["input_ids"]},
    "too-long": lambda example: text_example(2, 40),
}


@pytest.mark.parametrize("change", CHANGES)
def test_inputs_that_do_not_fit_the_model_are_refused_by_capture(change: str) -> None:
    with pytest.raises(TiFxError) as raised:
        ti_fx.capture(bert_model(layers=1), CHANGES[change](text_example()))
    assert_one_line(raised.value)


@pytest.mark.parametrize("change", ["dtype", "rank", "sizes", "names"])
def test_inputs_that_do_not_fit_the_graph_are_refused(bert: Tiny, change: str) -> None:
    with pytest.raises(TiFxError) as raised:
        bert.graph(**CHANGES[change](bert.example))
    assert_one_line(raised.value, "input")


@pytest.mark.parametrize("change", ["dtype", "rank", "sizes", "names"])
def test_an_example_that_does_not_fit_is_refused_before_a_file_is_made(
    tmp_path: Path, bert: Tiny, change: str
) -> None:
    gm = bert.fork()
    Pipeline(DecomposeAttention(), Ternarize(), Pack())(gm)
    with pytest.raises(TiFxError) as raised:
        to_onnx(gm, tmp_path / "student.onnx", CHANGES[change](bert.example))
    assert_one_line(raised.value, "input")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("change", CHANGES)
def test_inputs_that_do_not_fit_the_file_are_refused(onnx_file: Path, change: str) -> None:
    with pytest.raises(TiFxError) as raised:
        Runtime(onnx_file)(CHANGES[change](text_example()))
    assert_one_line(raised.value, "input")


# --- models ----------------------------------------------------------------------------------------------------------


class DropsLayers(NoAttention):
    """Decides in Python which layers run, as layerdrop does."""

    def forward(self, x: Tensor) -> Tensor:
        if random.random() < 0.5:
            x = self.first(x)
        return super().forward(x)


def with_baked_randomness() -> tuple[nn.Module, Example]:
    return DropsLayers(), {"x": torch.randn(3, 8)}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """This module's name, importable by the command line."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return Path(__file__).stem


def test_a_model_without_attention_is_refused(here: str) -> None:
    assert "has no attention block" in refused("inspect", f"{here}:without_attention")
    gm = ti_fx.capture(*without_attention())
    with pytest.raises(TiFxError) as raised:
        Recipe.preset("ti-g").prepare(gm)
    assert_one_line(raised.value, "no attention block")


def test_a_model_with_baked_randomness_is_refused(here: str, tmp_path: Path) -> None:
    out = tmp_path / "a.onnx"
    line = refused("export", f"{here}:with_baked_randomness", "--ternarize", "--out", out)
    assert "decides by a random number" in line
    assert "test_bad_input.py:" in line
    assert contents(tmp_path) == {}


# --- files, recipes and data that are not what they should be --------------------------------------------------------


def recipe_file(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps({**Recipe.preset("ternarybert").to_dict(), **changes}))
    return path


def test_what_train_is_given_is_checked_before_anything_is_written(
    tmp_path: Path, classifier: Path, rows_file: Path
) -> None:
    out = tmp_path / "out"
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    good: dict[str, object] = {"--data": rows_file, "--recipe": "ternarybert", "--steps": 4, "--out": out}

    def line(model: object = classifier, **changes: object) -> str:
        options = {**good, **{f"--{name.replace('_', '-')}": value for name, value in changes.items()}}
        return refused("train", model, *(part for option in options.items() for part in option))

    empty = write_rows(inputs / "empty.csv", ())
    wrong = write_rows(inputs / "wrong.csv", (*ROWS, "who,3"))
    assert "line 6: label 3 is out of range; the model has the ids 0 to 2" in line(data=wrong)
    assert "line 6: label 3 is out of range" in line(eval=wrong)
    assert "has 0 rows" in line(data=empty)
    assert "has 0 rows" in line(eval=empty)
    assert "No such file" in line(data=inputs / "missing.csv")
    assert "no recipe is called 'ti-x'; did you mean" in line(recipe="ti-x")
    assert "can't read recipe" in line(recipe=inputs / "missing.json")
    assert "did you mean 'schedule'" in line(recipe=recipe_file(inputs, shedule=[]))
    skip = recipe_file(inputs, ternarize={"skip": ["*.qurey"]})
    assert "matches no weight" in line(recipe=skip)
    assert "did you mean '*.query'" in line(recipe=skip)
    assert "need at least 7 optimiser steps and training has 4" in line(recipe="ti-g")
    assert "is 64, and the model takes at most 32 tokens" in line(max_length=64)
    assert "--learning-rate is -1.0" in line(learning_rate=-1)
    assert "'--steps'" in line(steps=0)
    assert "no finished checkpoint to resume from" in refused(
        "train", classifier, "--data", rows_file, "--out", out, "--resume"
    )
    assert "has no config.json" in line(model=inputs)
    untaught = inputs / "untaught"
    shutil.copytree(classifier, untaught)
    bert_model(layers=1).bert.save_pretrained(untaught)
    assert "not fine-tuned as a classifier" in line(model=untaught)
    assert not out.exists()
    assert "is a file" in line(out=rows_file / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


def test_a_run_is_not_written_over(checkpoint: Path, train_command: Train) -> None:
    before = contents(checkpoint)
    ran = train_command(checkpoint)
    assert ran.code == 2
    assert "holds a run already; --resume" in ran.err
    assert contents(checkpoint) == before


def test_what_export_and_check_are_given_is_checked(
    tmp_path: Path, classifier: Path, checkpoint: Path, onnx_file: Path
) -> None:
    out = tmp_path / "student.onnx"
    missing = tmp_path / "missing"
    assert "is a model, not a ti_fx checkpoint" in refused("export", classifier, "--out", out)
    assert "ti_fx.json is missing" in refused("export", missing, "--out", out)
    assert "there is no file or folder" in refused("export", missing, "--ternarize", "--out", out)
    assert "ternary already" in refused("export", checkpoint, "--ternarize", "--out", out)
    assert "ends in .onnx" in refused("export", checkpoint, "--out", tmp_path)
    assert "a folder" in refused("export", checkpoint, "--out", onnx_folder(tmp_path))
    assert "did you mean" in refused("export", checkpoint, "--out", out, "--encoding", "int8-tokn")
    assert "needs --encoding" in refused("export", checkpoint, "--out", out, "--requantize")
    assert "opset is 99; use 18 to 25" in refused("export", checkpoint, "--out", out, "--opset", 99)
    assert "Missing option '--out'" in refused("export", checkpoint)
    assert "No such file" in refused("check", out, checkpoint)
    assert "ti_fx.json is missing" in refused("check", onnx_file, missing)
    assert "is not an ONNX file" in refused("check", checkpoint / "config.json", checkpoint)
    assert contents(tmp_path) == {}


def onnx_folder(folder: Path) -> Path:
    path = folder / "folder.onnx"
    path.mkdir()
    return path


# At 0.99 the file is cut between two entries of its metadata, so that it can be read, and check fails (exit code 1).
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.985])
def test_a_truncated_onnx_file_is_refused(
    tmp_path: Path, onnx_file: Path, checkpoint: Path, share: float
) -> None:
    cut = tmp_path / "cut.onnx"
    content = onnx_file.read_bytes()
    cut.write_bytes(content[: int(share * len(content))])
    for arguments in (("check", cut, checkpoint), ("inspect", cut)):
        assert str(cut) in refused(*arguments)
    with pytest.raises(TiFxError) as raised:
        Runtime(cut)
    assert_one_line(raised.value, str(cut))


@pytest.mark.parametrize("name", ["model.safetensors", "ti_fx.json", "example.safetensors", "config.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, checkpoint: Path, name: str, share: float) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    assert str(folder) in refused("export", folder, "--out", tmp_path / "student.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_a_checkpoint_without_its_weights_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("checkpoint-*", "model.safetensors"))
    assert "model.safetensors" in refused("export", folder, "--out", tmp_path / "student.onnx")


def other_size() -> tuple[nn.Module, Example]:
    return bert_model(layers=1, intermediate_size=48), text_example()


def other_kind() -> tuple[nn.Module, Example]:
    return PlainTransformer(), {
        "tokens": text_example()["input_ids"],
        "keep": text_example()["attention_mask"],
    }


@pytest.mark.parametrize("factory", [other_size, other_kind])
def test_a_checkpoint_of_another_model_is_refused(
    here: str, tmp_path: Path, checkpoint: Path, factory: Callable[[], Any]
) -> None:
    out = tmp_path / "student.onnx"
    assert "is of another model" in refused(
        "export", checkpoint, "--source", f"{here}:{factory.__name__}", "--out", out
    )
    with pytest.raises(TiFxError) as raised:
        ti_fx.load(checkpoint, factory()[0])
    assert_one_line(raised.value, "is of another model")
    assert contents(tmp_path) == {}


def test_a_file_of_another_student_is_refused(onnx_file: Path, bert: Tiny) -> None:
    gm = prepared(bert)
    Pipeline(Strip(), Pack())(gm)
    with pytest.raises(TiFxError) as raised:
        check(onnx_file, gm, bert.example)
    assert "\n" not in str(raised.value)
    with pytest.raises(TiFxError) as raised:
        Pipeline(Intervene("map"))(gm)
    assert_one_line(raised.value)


def test_a_users_mistake_is_one_line_in_a_shell(tmp_path: Path, classifier: Path) -> None:
    """As a user sees it: nothing else, from no library, on standard error."""
    data = write_rows(tmp_path / "rows.csv", ("who,9",))
    command = [sys.executable, "-c", "from ti_fx.cli import main; main()", "train", classifier]
    done = subprocess.run(
        [*map(str, command), "--data", data, "--out", tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(Path(ti_fx.__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "label 9 is out of range" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]
