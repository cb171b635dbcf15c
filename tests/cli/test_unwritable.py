"""Places that can't be written: a refusal in one line, and what was there stays whole."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from classifier import Train
from refusals import assert_one_line, contents, refused, without_attention
from slow import slow
from tiny_training import trainer

import ti_fx
from ti_fx import Pipeline, Recipe
from ti_fx.errors import TiFxError
from ti_fx.export import to_onnx
from ti_fx.passes import Pack, Ternarize
from ti_fx.train import TernaryTrainer

# --- places that can't be written ------------------------------------------------------------------------------------


def mounted(folder: Path, *options: str) -> bool:
    """Mount a small file system of its own on a new folder; False where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(["size=64k", *options]), "tmpfs", str(folder)]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


@pytest.fixture(params=["below a file", *slow("read-only mount"), "no permission"])
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
