"""``sensitivity`` measures what each weight costs, and each layer, when it alone is ternary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.analysis.recorded import Recorder, run, with_teacher
from ti_fx.errors import InputError
from ti_fx.ir.inserted import quantised_weights, quantiser_of, weight_quantiser_of
from ti_fx.numerics import losses
from ti_fx.passes.prepare.tune_scales import Compared, compared


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
    ternary = {str(node.all_input_nodes[0].target): node for node in quantised_weights(gm)}
    if not ternary:
        raise InputError("the graph has no ternary weight; run ternarize")
    chosen = [(name,) for name in ternary] if groups is None else [tuple(group) for group in groups]
    for name in [name for group in chosen for name in group]:
        if name not in ternary:
            raise InputError(f"{name!r} is no ternary weight of the graph; these are {', '.join(ternary)}")
    given = [dict(batch) for batch in batches]
    if not given:
        raise InputError("there is no batch to measure on")
    output = compared(gm)
    if output is None:
        raise InputError(
            "the graph has no output that a teacher has, too; run duplicate-teacher before ternarize"
        )
    found = []
    for group in chosen:
        costs = [_cost(gm, output, {ternary[name] for name in group}, batch) for batch in given]
        found.append(Sensitivity(group, sum(costs) / len(costs)))
    return found


class _Only(Recorder):
    """Runs the student with some of its quantisers; the others give what they are given."""

    def __init__(self, gm: GraphModule, wanted: Iterable[Node], ternary: set[Node]) -> None:
        super().__init__(gm, wanted)
        self.ternary = ternary

    def run_node(self, n: Node) -> Any:
        """Run one node, or pass on what a quantiser reads."""
        left = weight_quantiser_of(n) is not None and n not in self.ternary
        if left or quantiser_of(n) is not None:
            result = self.env[n.all_input_nodes[0]]
            if n in self.wanted:
                self.found[n] = result
            return result
        return super().run_node(n)


def _cost(gm: GraphModule, output: Compared, ternary: set[Node], batch: Mapping[str, Tensor]) -> float:
    recorder = _Only(gm, [output.student, output.teacher], ternary)
    run(recorder, batch)
    student, teacher = (recorder.found[node].double() for node in (output.student, output.teacher))
    if output.is_logits:
        return float(losses.kl_divergence(student, teacher))
    variance = teacher.var(correction=0).clamp(min=torch.finfo(torch.float32).tiny)
    return float((student - teacher).square().mean() / variance)
