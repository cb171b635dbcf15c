"""Work in a process of its own, which may be killed, and the files that it writes.

The processes come from a server that has imported everything and run nothing: a process that has computed a gradient,
or run a graph in several threads, can't be forked. Work is a partial of a function of this file, which can be pickled.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import numpy as np
import torch
from classifier import ti_fx_command
from models import bert_model, text_example
from tiny_training import trainer
from torch.fx import GraphModule

import ti_fx
import ti_fx.demo.run
from ti_fx import Pipeline, Recipe
from ti_fx.demo.data import Questions, load_questions
from ti_fx.demo.students import StudentSettings
from ti_fx.demo.teacher import TeacherSettings
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
    child.join(600)
    assert child.exitcode is not None, "it did not end"
    return child.exitcode


def killed(work: Callable[[], object], folder: Path, seed: int, seconds: float, changes: int = 30) -> int:
    """Kill work at a random moment: at one of so many changes of the folder, or some time within what it takes."""
    draw = random.Random(seed)
    if draw.random() < 0.6:
        return ended(started(work, folder, draw.randrange(1, changes)))
    child = started(work, folder)
    time.sleep(draw.random() * seconds)
    child.kill()  # nothing, if it has ended
    return ended(child)


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


def demo(encoder: Path, out: Path) -> None:
    """Run the demo with another encoder, a few questions and a few steps; nothing is compiled."""
    every = load_questions()
    few = Questions(
        every.train[:32], every.validation[:16], every.test[:16], every.label_names, every.source_sha256
    )
    quick: dict[str, Any] = {
        "load_questions": lambda: few,
        "model_folder": lambda: encoder,
        "LATENCY_ROUNDS": 1,
    }
    with mock.patch.multiple(ti_fx.demo.run, **quick), redirect_stdout(io.StringIO()):
        ti_fx.demo.run.run(
            out,
            say=lambda line: None,
            teacher_settings=TeacherSettings(max_steps=2, batch_size=16),
            student_settings=StudentSettings(steps=62, evaluate_every=31, batch_size=2),
        )


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
