"""Finds the line of the model's own code that is running or has failed, and shortens it to what machines share."""

from __future__ import annotations

import os
import random
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch


def _folder(module: ModuleType) -> str:
    return str(Path(str(module.__file__)).parent) + os.sep


TORCH = _folder(torch)
TI_FX = str(Path(__file__).parents[1]) + os.sep


def caller() -> str:
    """Return ``file:line`` of the innermost running frame that is neither torch's nor ours; "" if there is none."""
    return _innermost(traceback.extract_stack(), (TORCH, TI_FX))


def failing_line(error: BaseException) -> str:
    """Return ``file:line`` of the innermost frame of an error that is the model's own code; "" if there is none."""
    return _innermost(traceback.extract_tb(error.__traceback__), (TORCH, TI_FX))


def drawing_line() -> str:
    """Return ``file:line`` of what draws a number by Python's or NumPy's generators; "" if that is ti_fx itself."""
    import numpy

    frames = traceback.extract_stack()[:-2]  # without this function and what calls it in a generator's place
    line = _innermost(frames, (TORCH, _folder(numpy), str(random.__file__)))
    return "" if line.startswith(TI_FX) else line


def short(where: str) -> str:
    """Return a place without what is the machine's own: graphs are compared between machines."""
    path, _, line = where.rpartition(":")
    _, installed, inside = path.replace("\\", "/").rpartition("site-packages/")
    return f"{inside if installed else inside.rpartition('/')[2]}:{line}"


def _innermost(frames: Iterable[traceback.FrameSummary], left_out: tuple[str, ...]) -> str:
    """Return the innermost frame whose file does not begin with any of these, and is a file."""
    for frame in reversed(list(frames)):
        if not frame.filename.startswith(("<", *left_out)):
            return f"{frame.filename}:{frame.lineno}"
    return ""
