"""How the cost of every pass grows with the layers, and what a 7B-parameter model costs on the meta device.

    python benchmarks/scale.py                      both; a process of its own for each model
    python benchmarks/scale.py --quick              3, 6 and 12 layers once, and a small model on the meta device

Slopes: tiny-width BERT- and Llama-like models of 12, 24, 48 and 96 layers; each step is timed on a fork, in processor
time with the garbage collector off (as timeit does), and the slope is that of log(median) over log(layers).
Meta: a Llama of 7B parameters without values is captured, prepared, intervened at each point and checked.
Exits with 1 if a slope is above SLOPE, or capture and prepare take more than SECONDS or GIGABYTES.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import ti_fx
from ti_fx.ir.pipeline import Pass
from ti_fx.passes import (
    Canonicalize,
    DecomposeAttention,
    Distill,
    DuplicateTeacher,
    Intervene,
    Pack,
    QuantizeActivations,
    Strip,
    Ternarize,
)

SLOPE = 1.10
SECONDS = 300.0
GIGABYTES = 6.0
LAYERS = (12, 24, 48, 96)
PREPARE: tuple[Pass, ...] = (
    DecomposeAttention(),
    DuplicateTeacher(),
    Ternarize(),
    QuantizeActivations(),
    Distill(),
)
POINTS: tuple[Pass, ...] = (Intervene(at="map"), Intervene(at="context"), Intervene(at="output"), Intervene())


def main() -> int:
    arguments = parse()
    torch.set_num_threads(1)
    if arguments.only == "meta":
        print(json.dumps(on_meta(arguments.quick)))
        return 0
    if arguments.only:
        print(json.dumps(seconds_by_step(arguments.only, arguments.quick, arguments.repeats)))
        return 0
    verdicts = [slopes(name, child(arguments, name)) for name in ("bert", "llama")]
    return 0 if all([*verdicts, meta(child(arguments, "meta"))]) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and once: does it run?")
    parser.add_argument("--repeats", type=int, default=5, help="of each step")
    parser.add_argument("--only", choices=("bert", "llama", "meta"), help="in this process, printed as JSON")
    return parser.parse_args()


def child(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Measure in a process of its own: memory is a process's, and so is what it has cached."""
    command = [sys.executable, __file__, "--only", name, "--repeats", str(arguments.repeats)]
    printed = subprocess.run(
        command + ["--quick"] * arguments.quick, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    measured: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return measured


# ---- slopes


def bert(layers: int) -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=1100,
        )
    )


def llama(layers: int) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            vocab_size=1100,
            use_cache=False,
        )
    )


def example() -> dict[str, Tensor]:
    ids = torch.arange(24).reshape(2, 12)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seconds_by_step(name: str, quick: bool, repeats: int) -> dict[str, Any]:
    """Return the median processor seconds of each step, by number of layers."""
    layers = (3, 6, 12) if quick else LAYERS
    found: dict[str, list[float]] = {}
    for count in layers:
        gm = ti_fx.capture({"bert": bert, "llama": llama}[name](count), example())
        for step, function in steps(gm):
            measured = [seconds(function, ti_fx.fork(gm)) for _ in range(1 if quick else repeats)]
            found.setdefault(step, []).append(statistics.median(measured))
    return {"layers": layers, "seconds": found}


def steps(gm: GraphModule) -> Iterator[tuple[str, Callable[[GraphModule], object]]]:
    """Yield each step as a function of a fork of the graph, which is then taken a pass further itself."""
    before = ti_fx.fork(gm)
    for one in (Canonicalize(), *PREPARE, *POINTS):
        pipeline = ti_fx.Pipeline(one)
        yield str(one), pipeline
        pipeline(gm)
    yield "find_attention", ti_fx.find_attention
    yield "verify", ti_fx.verify
    yield "dump", ti_fx.dump
    yield "diff", lambda fork: ti_fx.diff(before, fork)
    last: tuple[Pass, ...] = (Strip(), Pack())
    for one in last:
        pipeline = ti_fx.Pipeline(one)
        yield str(one), pipeline
        pipeline(gm)


def seconds(function: Callable[[GraphModule], object], gm: GraphModule) -> float:
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        function(gm)
        return time.process_time() - start
    finally:
        gc.enable()


def slope(sizes: list[int], values: list[float]) -> float:
    """Return the least-squares slope of log(values) over log(sizes)."""
    return statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, values))).slope


def slopes(name: str, measured: dict[str, Any]) -> bool:
    """Print the table of one model; return whether every step is linear."""
    table = Table(title=f"{name}: processor seconds (median) by number of layers; slope at most {SLOPE}")
    table.add_column("step")
    for column in (*map(str, measured["layers"]), "slope"):
        table.add_column(column, justify="right")
    found = {step: slope(measured["layers"], values) for step, values in measured["seconds"].items()}
    for step, values in measured["seconds"].items():
        table.add_row(step, *(f"{value:.3f}" for value in values), f"{found[step]:.2f}")
    Console().print(table)
    steep = [step for step, value in found.items() if value > SLOPE]
    if steep:
        print(f"{name}: steeper than {SLOPE}: {', '.join(steep)}")
    return not steep


# ---- 7B on the meta device


def on_meta(quick: bool) -> dict[str, Any]:
    """Return seconds and peak memory (GB) after each step on a Llama-shaped model without values."""
    start = time.perf_counter()
    rows: list[tuple[str, float, float]] = []

    def record(step: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
        rows.append((step, time.perf_counter() - start, peak))

    config = LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=2 if quick else 32,
        num_attention_heads=32,
        intermediate_size=11008,
        vocab_size=32000,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    record("build")
    gm = ti_fx.capture(model, example())
    record("capture")
    before = ti_fx.dump(gm)
    for one in PREPARE:
        ti_fx.Pipeline(one)(gm)
        record(str(one))
    prepared = rows[-1]
    for one in POINTS:
        ti_fx.Pipeline(one)(gm)
        record(str(one))
    sites = len(ti_fx.find_attention(gm))
    record("find_attention")
    ti_fx.verify(gm)
    record("verify")
    ti_fx.diff(before, gm)
    record("dump, diff")
    ti_fx.Pipeline(Strip())(gm)
    record("strip")
    unchecked = ti_fx.capture_report(gm).unchecked
    return {
        "parameters": parameters,
        "rows": rows,
        "prepared": prepared,
        "sites": sites,
        "unchecked": unchecked,
    }


def meta(measured: dict[str, Any]) -> bool:
    """Print the table; return whether capture and prepare stayed within the limits."""
    table = Table(title=f"meta device: {measured['parameters']:,} parameters, {measured['sites']} blocks")
    for column in ("after", "seconds", "peak GB"):
        table.add_column(column, justify="left" if column == "after" else "right")
    for step, passed, peak in measured["rows"]:
        table.add_row(step, f"{passed:.1f}", f"{peak:.2f}")
    Console().print(table)
    print(f"capture: {measured['unchecked']}")
    _, passed, peak = measured["prepared"]
    print(f"capture and prepare: {passed:.0f} s (limit {SECONDS:.0f}), {peak:.2f} GB (limit {GIGABYTES:.0f})")
    return bool(passed <= SECONDS and peak <= GIGABYTES)


if __name__ == "__main__":
    sys.exit(main())
