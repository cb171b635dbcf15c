"""A process is killed at a random moment: what it leaves is whole or not there, and another one goes on from it."""

from __future__ import annotations

import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from classifier import Train
from forked import (
    FINISHED,
    answer,
    ended,
    export_from_files,
    export_packed,
    is_one_of,
    killed,
    started,
    train,
)
from models import bert_model

import ti_fx
from ti_fx.export.file.content import open_file
from ti_fx.train.checkpoint import last_finished, read_facts, read_weights

pytestmark = pytest.mark.slow  # seconds a moment


def moments(many: int) -> list[range]:
    """Return seeds in blocks, which run side by side."""
    return [range(start, min(start + 11, many)) for start in range(0, many, 11)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    bert_model(layers=1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["one file", "two files", "pack_from"])
@pytest.mark.parametrize("block", moments(22), ids=str)
def test_a_killed_export_leaves_a_whole_file(weights: Path, kind: str, block: range, tmp_path: Path) -> None:
    def work(path: Path) -> partial[None]:
        if kind == "pack_from":
            return partial(export_from_files, weights, path)
        return partial(export_packed, 2, path, kind == "two files")

    before = tmp_path / "before" / "student.onnx"
    export_packed(1, before, kind == "two files")
    finished = Path(shutil.copytree(before.parent, tmp_path / "finished")) / before.name
    start = time.monotonic()
    assert ended(started(work(finished), tmp_path)) == FINISHED
    seconds = time.monotonic() - start
    right = [answer(before), answer(finished)]
    assert not is_one_of(right[0], right[1:])
    for seed in block:
        path = Path(shutil.copytree(before.parent, tmp_path / str(seed))) / before.name
        assert killed(work(path), path.parent, seed, seconds) in (FINISHED, -signal.SIGKILL)
        open_file(path)
        assert is_one_of(answer(path), right), seed
        assert ended(started(work(path), path.parent)) == FINISHED
        assert is_one_of(answer(path), right[1:]), seed
        assert not [left for left in path.parent.iterdir() if left.name.endswith(".tmp")]


@pytest.mark.parametrize("block", moments(26), ids=str)
def test_a_killed_run_goes_on_from_a_whole_checkpoint(
    classifier: Path, rows_file: Path, train_command: Train, block: range, tmp_path: Path
) -> None:
    start = time.monotonic()
    assert ended(started(partial(train, classifier, rows_file, tmp_path / "whole"), tmp_path)) == FINISHED
    seconds = time.monotonic() - start
    wanted = read_facts(tmp_path / "whole")["weights"]
    for seed in block:
        out = tmp_path / str(seed)
        how = killed(partial(train, classifier, rows_file, out), out, seed, seconds)
        assert how in (FINISHED, -signal.SIGKILL), seed
        for folder in out.glob("checkpoint-*"):
            read_weights(folder, read_facts(folder))
        if (out / "ti_fx.json").exists():
            ti_fx.load(out)
        if how == FINISHED:
            continue
        ran = train_command(out, *(("--resume",) if last_finished(out) is not None else ()))
        assert ran.code == 0, (seed, ran.err)
        assert read_facts(out)["weights"] == wanted, seed
