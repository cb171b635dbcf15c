"""Work in a process of its own, which may be killed, and the files that it writes.

The processes come from a server that has imported everything and run nothing: a process that has computed a gradient,
or run a graph in several threads, can't be forked. Work is a partial of a function of this file, which can be pickled.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from classifier import ti_fx_command
from models import bert_model, text_example
from tiny_training import trainer
from torch.fx import GraphModule

import ti_fx
from ti_fx import Pipeline, Recipe
from ti_fx.errors import TiFxError
from ti_fx.export import Runtime, pack_from, to_onnx
from ti_fx.passes import Pack, QuantizeActivations, Strip, Ternarize

FINISHED, REFUSED, FAILED = 0, 3, 1
CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.chmod",
    "os.link",
    "shutil.rmtree",
    "shutil.copyfile",
}
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["forked", "tiny_training", "ti_fx.cli", "ti_fx.train", "torch.onnx"])


def started(work: Callable[[], object], folder: Path, change: int | None = None) -> BaseProcess:
    """Start work, which must be picklable; it kills itself at its ``change``-th change of the folder."""
    child = _server.Process(target=_run, args=(work, str(folder), change))
    child.start()
    return child


def _run(work: Callable[[], object], folder: str, change: int | None) -> None:
    left = -1 if change is None else change

    def watch(event: str, given: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and folder in str(given):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    code = FAILED
    try:
        work()
        code = FINISHED
    except TiFxError:
        code = REFUSED
    finally:
        os._exit(code)


def ended(child: BaseProcess) -> int:
    """Wait for a process and return how it ended."""
    child.join(120)
    assert child.exitcode is not None, "it did not end"
    return child.exitcode


def packed(seed: int) -> GraphModule:
    """A packed student, in its weights alone another for another seed."""
    torch.manual_seed(seed)
    model = bert_model(layers=1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    gm = ti_fx.capture(model, text_example())
    Pipeline(Ternarize(), QuantizeActivations(), Pack())(gm)
    return gm


def export_packed(seed: int, path: Path, external: bool) -> None:
    """Write a packed student."""
    to_onnx(packed(seed), path, text_example(), external_data=external)


def export_from_files(weights: Path, path: Path) -> None:
    """Pack a model without values from a folder of weights, and write it."""
    model = bert_model(layers=1)
    with accelerate.init_empty_weights():
        empty: Any = type(model)(model.config)
    gm = ti_fx.capture(empty.to("meta"), text_example())
    Pipeline(Ternarize(), QuantizeActivations(), Strip())(gm)
    pack_from(gm, weights, dict(model.named_buffers()))
    to_onnx(gm, path, text_example())


def train(model: Path, data: Path, out: Path) -> None:
    """Train as the fixture ``train_command`` does."""
    settings = ("--recipe", "ternarybert", "--steps", 4, "--batch-size", 4, "--compile", "off")
    if ti_fx_command("train", model, "--data", data, "--out", out, *settings).code:
        raise TiFxError


def save_often(change: float, own: Path, folder: Path) -> None:
    """Save a model many times."""
    made = trainer(own, "ternarybert", model=bert_model(layers=1))
    with torch.no_grad():
        next(iter(made.model.parameters())).add_(change)
    for _ in range(20):
        made.save_model(str(folder))


def save_recipe(name: str, path: Path) -> None:
    """Save a recipe many times."""
    for _ in range(50):
        Recipe.preset(name).save(path)


def answer(path: Path) -> list[np.ndarray[Any, Any]]:
    """What a file computes."""
    return list(Runtime(path, threads=1)(text_example()).values())


def is_one_of(found: list[np.ndarray[Any, Any]], others: list[list[np.ndarray[Any, Any]]]) -> bool:
    """Whether an answer is, bit by bit, one of several."""
    return any(all(np.array_equal(a, b) for a, b in zip(found, other, strict=True)) for other in others)
