"""A process is killed at a random moment: what it leaves is whole or not there, and another one goes on from it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
from classifier import Train
from forked import FINISHED, answer, ended, is_one_of, packed, started
from models import bert_model, text_example

import ti_fx
from ti_fx import Pipeline
from ti_fx.errors import TiFxError
from ti_fx.export import pack_from, to_onnx
from ti_fx.export.file.content import open_file
from ti_fx.passes import QuantizeActivations, Strip, Ternarize
from ti_fx.train.checkpoint import last_finished, read_facts, read_weights


def killed(work: Callable[[], object], folder: Path, seed: int, seconds: float) -> int:
    """Kill work at a random moment: at a change of the folder, or some time within what it takes."""
    draw = random.Random(seed)
    if draw.random() < 0.6:
        return ended(started(work, folder, draw.randrange(1, 30)))
    child = started(work, folder)
    time.sleep(draw.random() * seconds)
    os.kill(child, signal.SIGKILL)
    return ended(child)


def moments(few: int, many: int) -> list[Any]:
    """Return blocks of seeds: the first few in `make test`, all in `make test-full`."""
    blocks = [range(few), *(range(start, min(start + 11, many)) for start in range(few, many, 11))]
    return [
        pytest.param(block, marks=[pytest.mark.slow] if block.start else [], id=f"{block.start}-{block.stop}")
        for block in blocks
    ]


# --- files ----------------------------------------------------------------------------------------------------------


def packed_from_files(folder: Path) -> Callable[[Path], object]:
    """Work that packs a model without values from a folder of weights, and writes it."""
    model = bert_model(layers=1)
    model.save_pretrained(folder)
    buffers = dict(model.named_buffers())
    with accelerate.init_empty_weights():
        empty = type(model)(model.config)

    def work(path: Path) -> object:
        gm = ti_fx.capture(empty.to("meta"), text_example())
        Pipeline(Ternarize(), QuantizeActivations(), Strip())(gm)
        pack_from(gm, folder, buffers)
        return to_onnx(gm, path, text_example())

    return work


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """By kind, the file that is there before, and the work that writes another one over it."""
    before, after = packed(1), packed(2)
    folder = tmp_path_factory.mktemp("before")
    found: dict[str, tuple[Path, Callable[[Path], object]]] = {}
    for kind, external in (("one file", False), ("two files", True)):
        path = folder / kind / "student.onnx"
        to_onnx(before, path, text_example(), external_data=external)
        found[kind] = (
            path,
            lambda path, external=external: to_onnx(  # type: ignore[misc]
                after, path, text_example(), external_data=external
            ),
        )
    found["packed from files"] = found["one file"][0], packed_from_files(folder / "weights")
    return found


@pytest.mark.parametrize("kind", ["one file", "two files", "packed from files"])
@pytest.mark.parametrize("block", moments(1, 23))
def test_a_killed_export_leaves_a_whole_file(
    files: dict[str, tuple[Path, Callable[[Path], object]]], kind: str, block: range, tmp_path: Path
) -> None:
    before, work = files[kind]
    finished = Path(shutil.copytree(before.parent, tmp_path / "finished")) / before.name
    start = time.monotonic()
    assert ended(started(lambda: work(finished), tmp_path)) == FINISHED
    seconds = time.monotonic() - start
    right = [answer(before), answer(finished)]
    assert not is_one_of(right[0], right[1:])
    for seed in block:
        path = Path(shutil.copytree(before.parent, tmp_path / str(seed))) / before.name
        how = killed(lambda path=path: work(path), path.parent, seed, seconds)  # type: ignore[misc]
        assert how in (FINISHED, -signal.SIGKILL)
        open_file(path)
        assert is_one_of(answer(path), right), seed
        assert ended(started(lambda path=path: work(path), path.parent)) == FINISHED  # type: ignore[misc]
        assert is_one_of(answer(path), right[1:]), seed
        assert not [left for left in path.parent.iterdir() if left.name.endswith(".tmp")]


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", moments(2, 34))
def test_a_killed_run_goes_on_from_a_whole_checkpoint(
    train_command: Train, checkpoint: Path, block: range, tmp_path: Path
) -> None:
    wanted = read_facts(checkpoint)["weights"]
    seconds = 6.0
    for seed in block:
        out = tmp_path / str(seed)

        def work(out: Path = out) -> None:
            if train_command(out).code:
                raise TiFxError

        how = killed(work, out, seed, seconds)
        assert how in (FINISHED, -signal.SIGKILL), seed
        for folder in out.glob("checkpoint-*"):
            read_weights(folder, read_facts(folder))
        if (out / "ti_fx.json").exists():
            ti_fx.load(out)
        resume = ("--resume",) if last_finished(out) is not None else ()
        if how == FINISHED:
            continue
        ran = train_command(out, *resume)
        assert ran.code == 0, (seed, ran.err)
        assert read_facts(out)["weights"] == wanted, seed
