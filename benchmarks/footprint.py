"""One contender in a fresh process: how long it loads, and the memory after one inference. Run by measure.py.

    python benchmarks/footprint.py KIND PATH MODEL QUICK FEED.npz

Prints JSON: ``steady``, bytes resident after one inference minus before the session; ``peak``, the most that were
resident in between, minus the same; ``load_seconds``, the median of LOADS. One thread. Linux only (/proc).
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from running import load
from subjects import QUICK, SUBJECTS

LOADS = 3


def main() -> int:
    kind, path, model, quick, inputs = sys.argv[1:]
    subject = (QUICK if int(quick) else SUBJECTS)[model]
    feed = {name: np.ascontiguousarray(value) for name, value in np.load(inputs).items()}
    torch.set_num_threads(1)
    if kind == "openvino":
        import openvino  # noqa: F401  the library itself is no part of what the model takes
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the imports left free would take in some of the model unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = resident("VmRSS")
    seconds = []
    found: dict[str, float] = {}
    for _ in range(LOADS):
        start = time.perf_counter()
        run = load(kind_of(kind), Path(path), subject, threads=1)
        seconds.append(time.perf_counter() - start)
        if not found:
            run(feed)
            found = {"steady": resident("VmRSS") - before, "peak": resident("VmHWM") - before}
    print(json.dumps(found | {"load_seconds": statistics.median(seconds)}))
    return 0


def kind_of(text: str) -> Any:
    if text not in ("onnx", "openvino", "torch"):
        raise ValueError(f"nothing runs a {text}")
    return text


def resident(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")
    )
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
