"""Latency, size, memory and error of exported ternary models against what else there is, interleaved in one run.

    python benchmarks/inference.py                     MiniLM, 1 and 2 threads, batch 1 and 8, sequence 128
    python benchmarks/inference.py --model bert-base   BERT-base's shape; gpt2: tokens per second after a cache,
                                                       with --prefill a prompt at once
    python benchmarks/inference.py --full              batch 1, 8, 32 by sequence 16, 128, 512: hours for BERT-base
    python benchmarks/inference.py --keep runs/kept    keep what was built: exporting BERT-base takes minutes
    python benchmarks/inference.py --quick             a small model of the same kind, no limits: does it run?

The baseline is the fp32 export of the original model (torch.onnx, scaled-dot-product attention, all ONNX Runtime
optimisations); contenders.py lists the rest. OpenVINO and onnxsim take part where the extra `benchmark` is installed,
PyTorch with --torch. Students are not trained and all weights but MiniLM's are random: values don't change
the cost, but the error against fp32 then says little; the error against the fake-quant graph counts.
In every round each contender runs once for a fixed share of time, so that a busy machine slows all of them alike;
medians count. Memory is measured in a fresh process each, with one thread, after one inference; loading is the median
of three in that process. "of copy" is the stored weights that a run reads, per second, over the bytes that the machine
copies; "of fp32 product" its operations per second over those of PyTorch's fp32 matrix product. Both take
their turns beside the contenders, with as many threads.
Exits with 1 if a limit (results.py) is not met.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from contenders import BASELINE, COMPILED, DYNAMIC_INT8, PYTORCH, Builder, Contender
from kept import Store
from measure import COPY, MULTIPLY, Call, distance, fresh, interleaved, machine
from results import (
    PLOT_TYPES,
    Finding,
    Timing,
    finding_table,
    limit_table,
    limits,
    plot,
    require_matplotlib,
    timing_table,
)
from rich.console import Console
from running import load
from subjects import QUICK, SUBJECTS, Subject
from transformers.utils import logging

from ti_fx.demo.circumstances import processor
from ti_fx.errors import TiFxError
from ti_fx.files import atomic_write
from ti_fx.numerics.encodings import ENCODINGS

DEFAULT_ENCODINGS = ("int8-tensor", "nbits2", "base3")
BATCHES, SEQUENCES = (1, 8), (128,)
FULL_BATCHES, FULL_SEQUENCES = (1, 8, 32), (16, 128, 512)
MINIMUM_ROUNDS = 7


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    console = Console(width=130)
    try:
        if options.plot is not None:
            require_matplotlib()
        if options.keep is not None:
            return measure(options, Store(options.keep, console), console)
        with tempfile.TemporaryDirectory() as name:
            return measure(options, Store(Path(name), console), console)
    except TiFxError as error:
        console.print(f"error: {error}", soft_wrap=True, markup=False)
        return error.exit_code


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", choices=sorted(SUBJECTS), default="minilm")
    parser.add_argument(
        "--encoding",
        choices=sorted(ENCODINGS),
        action="append",
        help=f"of ti_fx; repeat it for more (default: {', '.join(DEFAULT_ENCODINGS)})",
    )
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=positive, nargs="+", help="(default: 1 8)")
    parser.add_argument(
        "--sequence", type=positive, nargs="+", help="tokens, or tokens in a decoder's cache (default: 128)"
    )
    parser.add_argument(
        "--prefill",
        action="store_true",
        help="time a decoder on whole prompts instead of one token; no limits",
    )
    parser.add_argument("--full", action="store_true", help="batch 1 8 32 and sequence 16 128 512")
    parser.add_argument("--rounds", type=int, default=9, help=f"at least {MINIMUM_ROUNDS} (default: 9)")
    parser.add_argument("--torch", action="store_true", help="also PyTorch, eager and compiled")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what is built, for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help=f"draw size against latency ({', '.join(PLOT_TYPES)})"
    )
    parser.add_argument("--quick", action="store_true", help="a small model, no limits")
    options = parser.parse_args(arguments)
    if options.rounds < MINIMUM_ROUNDS:
        parser.error(f"--rounds is {options.rounds}; a median needs at least {MINIMUM_ROUNDS}")
    if options.prefill and not SUBJECTS[options.model].decodes:
        parser.error(f"--prefill is for a decoder, and {options.model} is none")
    if options.full and (options.batch or options.sequence):
        parser.error("--full gives all sizes; leave out --batch and --sequence")
    if options.plot is not None and options.plot.suffix not in PLOT_TYPES:
        parser.error(f"--plot is {options.plot}; its name must end with one of {', '.join(PLOT_TYPES)}")
    options.batch = options.batch or (FULL_BATCHES if options.full else BATCHES)
    options.sequence = options.sequence or (FULL_SEQUENCES if options.full else SEQUENCES)
    options.encoding = list(dict.fromkeys(options.encoding or DEFAULT_ENCODINGS))
    return options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def measure(options: argparse.Namespace, store: Store, console: Console) -> int:
    """Build, measure and print; return the exit code."""
    subject = (QUICK if options.quick else SUBJECTS)[options.model]
    contenders, left_out = build(subject, store, options)
    for label, reason in left_out.items():
        console.print(f"left out: {label} ({reason})", soft_wrap=True, markup=False)
    console.print("memory and loading, in fresh processes ...")
    memory = fresh(contenders, options.model, options.quick, subject.first_feed())
    findings = compared(contenders, subject, memory)
    console.print(finding_table(findings))
    timings: list[Timing] = []
    for threads in options.threads:
        console.print(f"timing, threads {threads} ...")
        timings += timed(contenders, subject, options, threads)
    after_cache = subject.decodes and not options.prefill
    console.print(timing_table(timings, after_cache))
    checks = [] if options.quick or options.prefill else limits(options.model, timings, findings)
    if checks:
        console.print(limit_table(checks))
    if options.json is not None:
        write_json(options, left_out, findings, timings, checks)
    if options.plot is not None:
        first = timings[0]
        size = f"{'past' if after_cache else 'sequence'} {first.sequence}"
        plot(
            options.plot,
            f"{subject.name}: threads {first.threads}, batch {first.batch}, {size}",
            timings,
            findings,
        )
    return 1 if any(check.met is False for check in checks) else 0


def build(
    subject: Subject, store: Store, options: argparse.Namespace
) -> tuple[list[Contender], dict[str, str]]:
    """Return the contenders, and why others are left out."""
    builder = Builder(subject, store)
    contenders = builder.baselines() + builder.openvino() + builder.peers()
    if options.torch:
        contenders += builder.pytorch()
    else:
        builder.left_out[f"{PYTORCH}, {COMPILED}"] = "--torch adds them; compiling takes minutes"
    contenders += [builder.student(encoding) for encoding in options.encoding]
    return contenders, builder.left_out


def compared(
    contenders: list[Contender], subject: Subject, memory: dict[str, dict[str, float]]
) -> list[Finding]:
    """Return each contender's errors beside its sizes."""
    feed = subject.error_feed()
    torch.set_num_threads(1)
    logits = {
        one.label: np.array(load(one.kind, one.path, subject, threads=1)(feed))
        for one in contenders
        if one.kind != "compiled"
    }
    logits |= {one.label: logits[PYTORCH] for one in contenders if one.kind == "compiled"}
    found = []
    for one in contenders:
        reference = None if one.reference is None else distance(logits[one.label], one.reference)
        found.append(
            Finding(
                one.label,
                one.bytes,
                reference,
                distance(logits[one.label], logits[BASELINE]),
                code_bits=one.facts.get("code_bits"),
                note=one.facts.get("note", ""),
                **memory.get(one.label, {}),
            )
        )
    return found


def timed(
    contenders: list[Contender],
    subject: Subject,
    options: argparse.Namespace,
    threads: int,
) -> Iterator[Timing]:
    """Yield every contender's timing at every size, with this number of threads; the machine takes its turns, too."""
    torch.set_num_threads(threads)
    runs = {one.label: load(one.kind, one.path, subject, threads) for one in contenders}
    streamed = {one.label: one.facts.get("streamed") for one in contenders}
    limits_of_machine = machine()
    for batch in options.batch:
        for sequence in options.sequence:
            feed = subject.feed(batch, sequence, options.prefill)
            operations = subject.operations(feed)
            calls: dict[str, Call] = {label: partial(run, feed) for label, run in runs.items()}
            calls |= {label: call for label, (call, _) in limits_of_machine.items()}
            seconds = interleaved(calls, options.rounds)
            reached = {label: amount / seconds[label] for label, (_, amount) in limits_of_machine.items()}
            for label in runs:
                median, size = seconds[label], streamed[label]
                yield Timing(
                    threads,
                    batch,
                    sequence,
                    label,
                    median,
                    over_fp32=seconds[BASELINE] / median,
                    over_int8=seconds[DYNAMIC_INT8] / median,
                    of_copy=None if size is None else size / median / reached[COPY],
                    of_multiply=operations / median / reached[MULTIPLY],
                    copied=reached[COPY],
                    multiplied=reached[MULTIPLY],
                )


def write_json(
    options: argparse.Namespace,
    left_out: dict[str, str],
    findings: list[Finding],
    timings: list[Timing],
    checks: list[Any],
) -> None:
    """Write every number, atomically."""
    content = {
        "model": options.model,
        "quick": options.quick,
        "prefill": options.prefill,
        "rounds": options.rounds,
        "processor": processor(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "onnxruntime": onnxruntime.__version__,
        },
        "left_out": left_out,
        "contenders": [asdict(one) for one in findings],
        "timings": [asdict(one) for one in timings],
        "limits": [asdict(one) | {"met": one.met} for one in checks],
    }
    atomic_write(options.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
