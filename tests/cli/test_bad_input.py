"""Whatever a user gets wrong: one line that says what, where and what to do, exit code 2, and no file harmed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from classifier import ROWS, Train, ti_fx_command, write_rows
from models import PlainTransformer, Tiny, bert_model, prepared, text_example
from tiny_training import trainer
from torch import Tensor, nn

import ti_fx
from ti_fx import Pipeline, Recipe
from ti_fx.errors import TiFxError
from ti_fx.export import Runtime, check, to_onnx
from ti_fx.passes import DecomposeAttention, Intervene, Pack, Strip, Ternarize
from ti_fx.train import TernaryTrainer

Example = dict[str, Tensor]


def assert_one_line(error: BaseException, *words: str) -> None:
    assert isinstance(error, TiFxError)
    assert error.exit_code == 2
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)


def refused(*arguments: object) -> str:
    """Run ti-fx, which must refuse in one line with exit code 2, and return that line."""
    ran = ti_fx_command(*arguments)
    assert ran.code == 2, ran.out + ran.err
    assert ran.err.startswith("ti-fx: ")
    assert ran.err.count("\n") == 1
    assert "Traceback" not in ran.out + ran.err
    return ran.err


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by its path: also hidden and temporary ones."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


class NoAttention(nn.Module):
    """Two layers and nothing to intervene in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.relu(self.first(x)))
        return logits


class DropsLayers(NoAttention):
    """Decides in Python which layers run, as layerdrop does."""

    def forward(self, x: Tensor) -> Tensor:
        if random.random() < 0.5:
            x = self.first(x)
        return super().forward(x)


def without_attention() -> tuple[nn.Module, Example]:
    return NoAttention(), {"x": torch.randn(3, 8)}


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
    assert "need at least 61 optimiser steps and training has 4" in line(recipe="ti-g")
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


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
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


# --- places that can't be written ------------------------------------------------------------------------------------


def mounted(folder: Path, *options: str) -> bool:
    """Mount a small file system of its own on a new folder; False where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(["size=64k", *options]), "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


@pytest.fixture(params=["below a file", "read-only mount", "no permission"])
def unwritable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder that can't be written to, in each way there is."""
    folder = tmp_path / "place"
    if request.param == "below a file":
        folder.write_text("kept")
        yield folder
        assert folder.read_text() == "kept"
    elif request.param == "read-only mount":
        if not mounted(folder, "ro"):
            pytest.skip("this user may not mount")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
    else:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        folder.mkdir(mode=0o500)
        yield folder
        folder.chmod(0o700)


def test_an_unwritable_folder_is_refused(unwritable: Path, checkpoint: Path, train_command: Train) -> None:
    with pytest.raises(TiFxError) as raised:
        Recipe.preset("ti-g").save(unwritable / "new" / "recipe.json")
    assert_one_line(raised.value, "can't write")
    assert "can't write" in refused("export", checkpoint, "--out", unwritable / "new" / "student.onnx")
    ran = train_command(unwritable / "new")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "can't write" in ran.err
    assert "step 1" not in ran.out


def test_a_disk_that_is_full_is_refused(tmp_path: Path, checkpoint: Path, train_command: Train) -> None:
    """A real one, of 64 kB: too small for the checkpoint and for the ONNX file, large enough for a recipe."""
    place = tmp_path / "place"
    if not mounted(place):
        pytest.skip("this user may not mount")
    try:
        Recipe.preset("ti-g").save(place / "recipe.json")
        good = contents(place)
        filler = place / "filler"
        filler.write_bytes(bytes(40_000))
        assert "can't write" in refused("export", checkpoint, "--out", place / "student.onnx")
        ran = train_command(place / "run")
        assert (ran.code, ran.err.count("\n")) == (2, 1)
        assert "can't write" in ran.err
        filler.unlink()
        assert contents(place) == good
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no write go beyond ``size`` bytes of a file; the kernel refuses it as it would on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Disk:
    """A disk that is full from its n-th fsync or rename on: each write ends with one of them."""

    def __init__(self, writes: int) -> None:
        self.left = writes
        self.filled = False

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        with (
            mock.patch("os.fsync", self._limited(os.fsync)),
            mock.patch("os.replace", self._limited(os.replace)),
        ):
            yield

    def _limited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            if not self.filled:
                self.left -= 1
                if self.left < 0:
                    # Once: what then puts the old files back writes nothing new, and a full disk lets it.
                    self.filled = True
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments)

        return called


def fails_at_each_write(write: Callable[[], object], folder: Path) -> int:
    """Run ``write`` with the disk filling up at its first, second, ... write until it succeeds; return how many.

    After each failure every file in the folder must be what it was before.
    """
    before = contents(folder)
    for writes in range(200):
        disk = Disk(writes)
        try:
            with disk.mounted():
                write()
        except TiFxError as error:
            assert disk.filled
            assert_one_line(error, "can't write", "No space left on device", "free some space")
            assert contents(folder) == before, f"write {writes}"
        else:
            if not disk.filled:  # else it was the folder's own fsync, after the new file is there
                return writes
            before = contents(folder)
    raise AssertionError("200 writes, and no end")


def test_a_recipe_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    Recipe.preset("ti-m").save(path)
    assert fails_at_each_write(lambda: Recipe.preset("ti-g").save(path), tmp_path) >= 2
    assert Recipe.load(path) == Recipe.preset("ti-g")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TernaryTrainer:
    """A short run, and a checkpoint of it."""
    options = {"max_steps": 2}
    made = trainer(tmp_path_factory.mktemp("run"), "ternarybert", arguments_options=options)
    made.train()
    made._save_checkpoint(made.model, None)
    return made


def test_a_model_is_saved_whole_or_not_at_all(tmp_path: Path, run: TernaryTrainer) -> None:
    run.save_model(str(tmp_path))
    (tmp_path / "notes.txt").write_text("the user's own")
    parameter = next(iter(run.model.parameters()))
    with torch.no_grad():
        parameter.add_(1)
    assert fails_at_each_write(lambda: run.save_model(str(tmp_path)), tmp_path) > 10
    assert (tmp_path / "notes.txt").read_text() == "the user's own"
    ti_fx.load(tmp_path)


def test_a_checkpoint_is_saved_whole_or_not_at_all(run: TernaryTrainer) -> None:
    folder = Path(str(run.args.output_dir))
    assert fails_at_each_write(lambda: run._save_checkpoint(run.model, None), folder) > 10


@pytest.mark.parametrize("size", [0, 100, 2_000, 20_000])
def test_whichever_file_is_too_large_the_checkpoint_stays(
    tmp_path: Path, run: TernaryTrainer, size: int
) -> None:
    """As a full disk refuses writes, in whichever library they are made."""
    run.save_model(str(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(TiFxError) as raised, largest_file(size):
        run.save_model(str(tmp_path))
    assert_one_line(raised.value, "can't write", "free some space")
    assert contents(tmp_path) == before
    folder = Path(str(run.args.output_dir))
    before = contents(folder)
    with pytest.raises(TiFxError) as raised, largest_file(size):
        run._save_checkpoint(run.model, None)
    assert_one_line(raised.value, "can't write", "free some space")
    assert contents(folder) == before


def test_an_onnx_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    model, example = without_attention()
    gm = ti_fx.capture(model, example)
    Pipeline(Ternarize(), Pack())(gm)
    path = tmp_path / "student.onnx"
    path.write_bytes(b"the previous file")
    for size in (0, 500):
        with pytest.raises(TiFxError) as raised, largest_file(size):
            to_onnx(gm, path, example)
        assert_one_line(raised.value, "can't write", "free some space")
        assert contents(tmp_path) == {"student.onnx": b"the previous file"}
