"""Seconds, memory and the machine's own limits."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import Contender
from numpy.typing import NDArray
from running import Kind
from subjects import Feed

from ti_fx.numerics.closeness import relative

Call = Callable[[], object]

SECONDS = 0.15  # least time of one contender in one round
WARM_UP = 3  # runs before the first round, if they don't take longer than
WARM_UP_SECONDS = 2.0
COPIED_BYTES = 1 << 28  # far beyond any cache
MATRIX = 1024
COPY, MULTIPLY = "copy", "multiply"


def interleaved(calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
    """Return each contender's median seconds per call.

    In every round each runs for a fixed share of time, so that a busy machine slows all of them alike.
    """
    repeats = {label: max(1, round(SECONDS / _warm_up(call))) for label, call in calls.items()}
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items():
            times[label].append(seconds_of(call, repeats[label]))
    return {label: statistics.median(values) for label, values in times.items()}


def _warm_up(call: Call) -> float:
    """Run until it is warm; return the seconds of one more call."""
    start = time.perf_counter()
    for _ in range(WARM_UP):
        call()
        if time.perf_counter() - start > WARM_UP_SECONDS:
            break
    return seconds_of(call)


def seconds_of(call: Call, repeats: int = 1) -> float:
    """Return the mean seconds of a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def machine() -> dict[str, tuple[Call, float]]:
    """Return what shows the machine's limits, with the amount of one call, to be timed beside the contenders.

    ``copy`` counts bytes, read and written; ``multiply`` the operations of a product of fp32 matrices. Both run in
    PyTorch with its number of threads.
    """
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    left, right = torch.ones(MATRIX, MATRIX), torch.ones(MATRIX, MATRIX)
    product = torch.empty(MATRIX, MATRIX)
    return {
        COPY: (lambda: target.copy_(source), 2 * COPIED_BYTES),
        MULTIPLY: (lambda: torch.mm(left, right, out=product), 2 * MATRIX**3),
    }


def distance(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the relative L2 distance."""
    return relative(torch.from_numpy(found), torch.from_numpy(expected))


def fresh(contenders: list[Contender], model: str, quick: bool, feed: Feed) -> dict[str, dict[str, float]]:
    """Return ``load_seconds``, ``steady`` and ``peak`` bytes of each contender, each in a process of its own.

    Compiled contenders are left out: their first run compiles for minutes.
    """
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name) / "feed.npz"
        np.savez(inputs, allow_pickle=False, **feed)
        return {
            one.label: _footprint(one.kind, one.path, model, quick, inputs)
            for one in contenders
            if one.kind != "compiled"
        }


def _footprint(kind: Kind, path: Path, model: str, quick: bool, inputs: Path) -> dict[str, float]:
    script = Path(__file__).with_name("footprint.py")
    command = [sys.executable, str(script), kind, str(path), model, str(int(quick)), str(inputs)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr.strip()[-1000:]}")
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found
