"""Seconds per training step of the prepared graph against plain fine-tuning of the same model, in one run.

    python benchmarks/train_step.py                 MiniLM's shape, batch 32, sequence 64, fp32, AdamW
    python benchmarks/train_step.py --quick         a small shape: does it run?

A step is forward, backward and optimiser. Every contender has its own copy of the model (random weights: values
don't change the cost) and the rounds are interleaved, so that a busy machine slows all of them alike; medians count.
Exits with 1 if plain quantisation-aware training (no intervention), eager or compiled, whichever is faster, takes
more than LIMIT times the fine-tuning step.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import BertConfig, BertForSequenceClassification

import ti_fx
from ti_fx.passes import Distill, DuplicateTeacher, Intervene, QuantizeActivations, Ternarize
from ti_fx.train.model import FOR_ONE_PHASE

LIMIT = 1.5  # of fine-tuning; a teacher's forward alone makes it 4/3
POINTS = ("none", "output", "context", "map")
FINE_TUNING = "fine-tuning"


@dataclass
class Contender:
    """One thing to time: a step, what compiling cost before the first one, and how many graphs that made."""

    step: Callable[[], None]
    compile_seconds: float | None = None
    graphs: int | None = None


def main() -> int:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config(arguments.quick)).train()
    rows, tokens = (4, 16) if arguments.quick else (arguments.batch, arguments.sequence)
    ids = torch.randint(1000, model.config.vocab_size, (rows, tokens))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.randint(0, model.config.num_labels, (rows,))
    contenders = {FINE_TUNING: fine_tuning(copy.deepcopy(model), inputs, labels)}
    gm = prepare(model, inputs, arguments.encoding)
    for point in arguments.points:
        contenders[f"{point}, eager"] = eager(phase(gm, point), inputs)
        if not arguments.no_compile:
            contenders[f"{point}, compiled"] = compiled(phase(gm, point), inputs)
    seconds = rounds(contenders, 2 if arguments.quick else arguments.rounds)
    return report(contenders, seconds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, two rounds")
    parser.add_argument("--no-compile", action="store_true", help="eager only")
    parser.add_argument("--points", nargs="+", choices=POINTS, default=POINTS, help="which interventions")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--encoding", default="int8-tensor", help="of the activations")
    return parser.parse_args()


def config(quick: bool) -> BertConfig:
    """Return all-MiniLM-L6-v2's shape, or a small one."""
    if quick:
        return BertConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=2000
        )
    return BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
    )


def prepare(model: nn.Module, inputs: dict[str, Tensor], encoding: str) -> GraphModule:
    """Return the graph of student, teacher and all losses."""
    gm = ti_fx.capture(model, inputs)
    ti_fx.Pipeline(DuplicateTeacher(), Ternarize(), QuantizeActivations(encoding=encoding), Distill())(gm)
    return gm.train()


def phase(gm: GraphModule, point: str) -> GraphModule:
    """Return the graph of one phase as the trainer makes it: a fork, over the same tensors, without dead nodes."""
    forked = ti_fx.fork(gm)
    ti_fx.Pipeline(Intervene(at=None if point == "none" else point))(forked)
    FOR_ONE_PHASE(forked)
    return forked


def fine_tuning(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Contender:
    """Return the baseline: the transformers model with its own loss, as it is loaded."""
    return Contender(stepper(model, lambda: model(**inputs, labels=labels).loss))


def eager(gm: GraphModule, inputs: dict[str, Tensor]) -> Contender:
    return Contender(stepper(gm, lambda: gm(**inputs)["loss"]))


def compiled(gm: GraphModule, inputs: dict[str, Tensor]) -> Contender:
    """Return the compiled step, compiled here: the first step is not timed with the others."""
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    module = torch.compile(gm, fullgraph=True, dynamic=True)
    step = stepper(gm, lambda: module(**inputs)["loss"])
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    return Contender(step, seconds, torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs)


def stepper(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Return one training step with an AdamW of its own."""
    optimiser = torch.optim.AdamW([value for value in module.parameters() if value.requires_grad], lr=1e-6)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return step


def rounds(contenders: dict[str, Contender], count: int) -> dict[str, list[float]]:
    """Time one step of each contender a round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(count + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender.step()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(contenders: dict[str, Contender], seconds: dict[str, list[float]]) -> int:
    """Print the table; return the exit code."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = medians[FINE_TUNING]
    table = Table(
        title=f"training step, {torch.get_num_threads()} threads, median of {len(seconds[FINE_TUNING])}"
    )
    for column in ("intervention", "seconds", "ratio", "compile s", "graphs"):
        table.add_column(column, justify="left" if column == "intervention" else "right")
    for name, contender in contenders.items():
        built = "" if contender.compile_seconds is None else f"{contender.compile_seconds:.1f}"
        graphs = "" if contender.graphs is None else str(contender.graphs)
        table.add_row(name, f"{medians[name]:.3f}", f"{medians[name] / base:.2f}", built, graphs)
    Console().print(table)
    plain = [name for name in medians if name.startswith("none")]
    if not plain:
        return 0
    best = min(plain, key=lambda name: medians[name])
    ratio = medians[best] / base
    verdict = "within" if ratio <= LIMIT else "above"
    print(f"{best}: {ratio:.2f}x fine-tuning, {verdict} the limit of {LIMIT}x")
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
