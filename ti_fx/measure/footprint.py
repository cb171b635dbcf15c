"""The footprint of an ONNX file, its loading, memory and time, is measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ti_fx.errors import ExportError

_FRESH = """
import os, sys, time, numpy, onnxruntime
def resident():
    if not os.path.exists("/proc/self/statm"):
        return -1
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])
stored = numpy.load(sys.argv[2])
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
if int(sys.argv[3]):
    options.intra_op_num_threads = int(sys.argv[3])
before, start = resident(), time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
loading = time.perf_counter() - start
session.run(None, {one.name: stored[one.name] for one in session.get_inputs()})
print(loading, -1 if before < 0 else resident() - before)
"""


@dataclass(frozen=True)
class Footprint:
    """What a file costs before it is fast.

    Attributes:
        load_milliseconds: until the session is ready.
        megabytes: of memory, after one run against before loading; None where the system does not say.
    """

    load_milliseconds: float
    megabytes: float | None


def footprint(path: Path, inputs: Path, threads: int | None) -> Footprint:
    """Load a file in a fresh process, with plain session options, and run it once.

    Args:
        path: the ONNX file.
        inputs: a ``.npz`` file with its inputs by name; others in it are left alone.
        threads: within a node; None is one per core.

    Raises:
        ExportError: the process fails.
    """
    command = [sys.executable, "-c", _FRESH, str(path), str(inputs), str(threads or 0)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ExportError(
            f"can't measure {path.name} in a process of its own: {result.stderr.strip()[-200:]}"
        )
    loading, pages = map(float, result.stdout.split())
    return Footprint(1e3 * loading, None if pages < 0 else pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
