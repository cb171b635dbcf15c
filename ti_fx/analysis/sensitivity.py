"""``sensitivity`` measures what each weight costs, and each layer, when it alone is ternary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx import numerics
from ti_fx.analysis.recorded import Recorder, run, with_teacher
from ti_fx.errors import InputError
from ti_fx.find.outputs import logits
from ti_fx.ir import roles
from ti_fx.ir.inserted import quantiser_of
from ti_fx.ir.outputs import model_outputs, named_leaves


@dataclass(frozen=True)
class Sensitivity:
    """What one weight, or one group of weights, costs.

    Attributes:
        weights: the names of the Parameters that alone are ternary.
        cost: the divergence of the student's logits from the teacher's, a mean over rows (and tokens), in nats; where
            there are no logits, the mean squared error of the first output over the teacher's variance.
    """

    weights: tuple[str, ...]
    cost: float


def sensitivity(
    gm: GraphModule, batches: Iterable[Mapping[str, Tensor]], *, groups: Iterable[Iterable[str]] | None = None
) -> list[Sensitivity]:
    """Measure each ternary weight alone, everything else in full precision, activations, too.

    Args:
        gm: a prepared graph with a teacher; interventions do not count.
        batches: its inputs by name.
        groups: Parameters that are ternary together, by name (those of a layer); None: each weight by itself.

    Returns:
        A row a weight or group, in the order of the graph or of ``groups``.

    Raises:
        InputError: no weight is ternary, a group names another, or there is no teacher or no batch.
    """
    gm = with_teacher(gm)
    ternary = {
        str(node.all_input_nodes[0].target): node
        for node in gm.graph.nodes
        if node.target is numerics.ternary
    }
    if not ternary:
        raise InputError("the graph has no ternary weight; run ternarize")
    chosen = [(name,) for name in ternary] if groups is None else [tuple(group) for group in groups]
    for name in [name for group in chosen for name in group]:
        if name not in ternary:
            raise InputError(f"{name!r} is no ternary weight of the graph; these are {', '.join(ternary)}")
    given = [dict(batch) for batch in batches]
    if not given:
        raise InputError("there is no batch to measure on")
    compared = _compared(gm)
    found = []
    for group in chosen:
        costs = [_cost(gm, compared, {ternary[name] for name in group}, batch) for batch in given]
        found.append(Sensitivity(group, sum(costs) / len(costs)))
    return found


class _Only(Recorder):
    """Runs the student with some of its quantisers; the others give what they are given."""

    def __init__(self, gm: GraphModule, wanted: Iterable[Node], ternary: set[Node]) -> None:
        super().__init__(gm, wanted)
        self.ternary = ternary

    def run_node(self, n: Node) -> Any:
        """Run one node, or pass on what a quantiser reads."""
        left = n.target is numerics.ternary and n not in self.ternary
        if left or quantiser_of(n) is not None:
            result = self.env[n.all_input_nodes[0]]
            if n in self.wanted:
                self.found[n] = result
            return result
        return super().run_node(n)


def _compared(gm: GraphModule) -> Node:
    found = logits(gm)
    if found:
        return found[0]
    return next(iter(named_leaves(model_outputs(gm)).values()))


def _cost(gm: GraphModule, output: Node, ternary: set[Node], batch: Mapping[str, Tensor]) -> float:
    twin = roles.twin_of(gm.graph)[output]
    recorder = _Only(gm, [output, twin], ternary)
    run(recorder, batch)
    student, teacher = recorder.found[output].double(), recorder.found[twin].double()
    if logits(gm) and student.shape[-1] > 1:
        known, own = teacher.log_softmax(-1), student.log_softmax(-1)
        return float((known.exp() * (known - own)).sum(-1).mean())
    variance = teacher.var(correction=0).clamp(min=torch.finfo(torch.float32).tiny)
    return float((student - teacher).square().mean() / variance)
