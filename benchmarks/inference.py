"""Latency and size of the exported ternary MiniLM against two baselines, interleaved in one run.

    python benchmarks/inference.py                     int8-tensor, 1 and 2 threads, batch 1 and 8, sequence 128
    python benchmarks/inference.py --encoding float    another encoding: no limit on its speed

Baselines: the fp32 export of the original model (torch.onnx, sdpa, all ONNX Runtime optimisations) and ONNX Runtime's
own dynamic int8 of it. The student is not trained: values don't change the cost. In every round each contender runs
once for a fixed share of time, so that a busy machine slows all of them alike; medians count.
Exits with 1 below the limits: speed over fp32, megabytes on disk, bits per ternary weight.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

import ti_fx
from ti_fx.demo.baselines import export_dynamic_int8, export_fp32
from ti_fx.demo.data import model_folder
from ti_fx.encodings import ENCODINGS
from ti_fx.export import ExportReport, session, to_onnx
from ti_fx.passes import Pack, QuantizeActivations, Strip, Ternarize

SPEED = {1: 2.5, 2: 2.0}  # least speed over fp32, by threads
MEGABYTES = 7.0
BITS = 2.0
SEQUENCE = 128
BATCHES = (1, 8)
MINIMUM_ROUNDS = 7
SECONDS = 0.15  # least time of one contender in one round
WARM_UP = 3

Feed = dict[str, object]


def main() -> int:
    arguments = parse()
    logging.set_verbosity_error()
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        console.print("exporting the student and both baselines (about a minute) ...")
        report = export_all(folder, arguments.encoding)
        files = {"fp32": folder / "fp32.onnx", "ORT int8": folder / "int8.onnx", "student": report.path}
        failures = limits_of_size(report)
        table = Table(
            "threads", "batch", *(f"{label}, ms" for label in files), "over fp32", "over ORT int8", "limit"
        )
        for threads in arguments.threads:
            sessions = {label: session(path, threads) for label, path in files.items()}
            for batch in BATCHES:
                times = interleaved(sessions, feed(batch, SEQUENCE), arguments.rounds)
                over = {label: times[label] / times["student"] for label in ("fp32", "ORT int8")}
                limit = SPEED.get(threads) if arguments.encoding == "int8-tensor" else None
                if limit is not None and over["fp32"] < limit:
                    failures.append(
                        f"{threads} threads, batch {batch}: {over['fp32']:.2f}x fp32, needs {limit}x"
                    )
                table.add_row(
                    str(threads),
                    str(batch),
                    *(f"{1e3 * times[label]:.1f}" for label in files),
                    *(f"{over[label]:.2f}x" for label in ("fp32", "ORT int8")),
                    f"{limit}x" if limit else "",
                )
        console.print(table)
        sizes = ", ".join(f"{label} {path.stat().st_size / 1e6:.2f} MB" for label, path in files.items())
        console.print(f"on disk: {sizes}")
        console.print(
            f"bits per ternary weight: {report.code_bits:.3f}, {report.code_and_scale_bits:.3f} with scales"
        )
    for failure in failures:
        console.print(f"[red]below the limit:[/red] {failure}")
    return 1 if failures else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--encoding", choices=sorted(ENCODINGS), default="int8-tensor")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if arguments.rounds < MINIMUM_ROUNDS:
        parser.error(f"--rounds is {arguments.rounds}; a median needs at least {MINIMUM_ROUNDS}")
    return arguments


def inputs(batch: int, sequence: int) -> dict[str, Tensor]:
    ids = torch.randint(1000, 30000, (batch, sequence), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def feed(batch: int, sequence: int) -> Feed:
    return {name: value.numpy() for name, value in inputs(batch, sequence).items()}


def export_all(folder: Path, encoding: str) -> ExportReport:
    """Write ``fp32.onnx``, ``int8.onnx`` and ``student.onnx`` into a folder."""
    example = inputs(2, 16)
    source = model_folder()
    export_fp32(source, folder / "fp32.onnx", example)
    export_dynamic_int8(folder / "fp32.onnx", folder / "int8.onnx")
    gm = ti_fx.capture(AutoModelForSequenceClassification.from_pretrained(source).eval(), example)
    ti_fx.Pipeline(Ternarize(), QuantizeActivations(encoding=encoding), Strip(), Pack())(gm)
    return to_onnx(gm, folder / "student.onnx", example)


def limits_of_size(report: ExportReport) -> list[str]:
    failures = []
    if report.bytes > MEGABYTES * 1e6:
        failures.append(f"{report.bytes / 1e6:.2f} MB on disk, at most {MEGABYTES} are allowed")
    if report.code_bits > BITS:
        failures.append(f"{report.code_bits:.3f} bits per ternary weight, at most {BITS} are allowed")
    return failures


def interleaved(
    sessions: dict[str, onnxruntime.InferenceSession], given: Feed, rounds: int
) -> dict[str, float]:
    """Return each contender's median seconds per run."""
    repeats = {}
    for label, contender in sessions.items():
        for _ in range(WARM_UP):
            contender.run(None, given)
        repeats[label] = max(1, round(SECONDS / seconds(contender, given, 1)))
    times: dict[str, list[float]] = {label: [] for label in sessions}
    for _ in range(rounds):
        for label, contender in sessions.items():
            times[label].append(seconds(contender, given, repeats[label]))
    return {label: statistics.median(values) for label, values in times.items()}


def seconds(contender: onnxruntime.InferenceSession, given: Feed, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        contender.run(None, given)
    return (time.perf_counter() - start) / repeats


if __name__ == "__main__":
    sys.exit(main())
