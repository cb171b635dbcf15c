"""``divergence`` measures how far a prepared student's outputs are from its teacher's, on rows of data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.errors import InputError
from ti_fx.ir.edit import mode
from ti_fx.ir.outputs import model_outputs, named_leaves
from ti_fx.ir.rows import as_batches
from ti_fx.ir.run_by_need import RunByNeed
from ti_fx.passes.prepare.tune_scales import compared

EVERY_ROW = 2**62


@dataclass(frozen=True)
class Divergence:
    """How far a student is from its teacher.

    Attributes:
        measure: ``KL``: the mean of KL(teacher || student) over rows, of language models over tokens that are no
            padding; ``relative error``: the squared error of another output, beside its variance in the teacher.
        value: 0 is exact.
        agreement: the share in which both have the same largest logit; None without logits.
        output: the output that is compared.
        rows: of data.
    """

    measure: str
    value: float
    agreement: float | None
    output: str
    rows: int

    def __str__(self) -> str:
        agrees = "" if self.agreement is None else f", same answer in {self.agreement:.1%}"
        return f"{self.measure} of {self.output} {self.value:.4f}{agrees}"


@torch.no_grad()
def divergence(
    gm: GraphModule,
    data: Mapping[str, Tensor] | Iterable[Mapping[str, Any]],
    *,
    rows: int = EVERY_ROW,
    batch_size: int = 32,
) -> Divergence:
    """Compare a prepared student with its teacher, in eval mode: the first logits, else the first output.

    Args:
        gm: a graph with a teacher.
        data: as :class:`ti_fx.passes.Calibrate` takes it.
        rows: how many are taken, from the front.
        batch_size: of one mapping's batches.

    Raises:
        InputError: the graph has no teacher, or does not take the data. DataError: there are no rows, or one holds NaN.
    """
    found = compared(gm)
    if found is None:
        raise InputError(
            "the graph has no output that a teacher has, too; run duplicate-teacher before ternarize"
        )
    student, teacher, mask, is_logits = found.student, found.teacher, found.mask, found.is_logits
    name = next(name for name, node in named_leaves(model_outputs(gm)).items() if node is student)
    batches = as_batches(gm, data, rows, batch_size)
    nodes = [student, teacher, *(() if mask is None else (mask,))]
    sums = _Sums(is_logits)

    def add(values: Mapping[Node, Any]) -> None:
        kept = None if mask is None else values[mask].reshape(-1) != 0
        pair = [values[node].reshape(-1, values[node].shape[-1]).double() for node in (student, teacher)]
        sums.add(*(value if kept is None else value[kept] for value in pair))

    with mode(gm, training=False):
        RunByNeed(gm, batches, nodes).visit(nodes, add)
    count = sum(len(next(iter(batch.values()))) for batch in batches)
    if is_logits:
        return Divergence("KL", sums.distance / sums.count, sums.same / sums.count, name, count)
    spread = sums.square - float(sums.first.square().sum()) / sums.count
    return Divergence("relative error", sums.distance / max(spread, 1e-30), None, name, count)


class _Sums:
    def __init__(self, is_logits: bool) -> None:
        self.is_logits = is_logits
        self.distance = self.square = 0.0
        self.first = torch.zeros(())
        self.count = self.same = 0

    def add(self, student: Tensor, teacher: Tensor) -> None:
        self.count += len(teacher)
        if self.is_logits:
            wanted, found = teacher.log_softmax(-1), student.log_softmax(-1)
            self.distance += float((wanted.exp() * (wanted - found)).sum())
            self.same += int((student.argmax(-1) == teacher.argmax(-1)).sum())
        else:
            self.distance += float((student - teacher).square().sum())
            self.square += float(teacher.square().sum())
            self.first = self.first + teacher.sum(0)
