"""Work in a process of its own, which may be killed, and the files that it writes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import bert_model, text_example
from torch.fx import GraphModule

import ti_fx
from ti_fx import Pipeline
from ti_fx.errors import TiFxError
from ti_fx.export import Runtime
from ti_fx.passes import Pack, QuantizeActivations, Ternarize

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


def started(work: Callable[[], object], folder: Path, change: int | None = None) -> int:
    """Work in a process of its own, and return its id; it kills itself at its ``change``-th change of the folder."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)  # the threads of OpenMP stayed in the parent
    left = -1 if change is None else change

    def watch(event: str, given: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and str(folder) in str(given):
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


def ended(child: int) -> int:
    """Wait for a process and return how it ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def packed(seed: int) -> GraphModule:
    """A packed student, in its weights alone another for another seed."""
    torch.manual_seed(seed)
    gm = ti_fx.capture(bert_model(layers=1), text_example())
    with torch.no_grad():
        for value in gm.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    Pipeline(Ternarize(), QuantizeActivations(), Pack())(gm)
    return gm


def answer(path: Path) -> list[np.ndarray[Any, Any]]:
    return list(Runtime(path, threads=1)(text_example()).values())


def is_one_of(found: list[np.ndarray[Any, Any]], others: list[list[np.ndarray[Any, Any]]]) -> bool:
    return any(all(np.array_equal(a, b) for a, b in zip(found, other, strict=True)) for other in others)
