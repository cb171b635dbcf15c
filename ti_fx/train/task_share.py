"""What a task's loss is a mean over is measured on two rows: labels, labels but a row's first, rows, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ti_fx.errors import DataError, InputError
from ti_fx.ir.edit import mode
from ti_fx.train.task_loss import TaskLoss, leaves

IGNORED = -100
CLOSE = 1e-5

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """How the labels of a batch are counted.

    Attributes:
        over: ``labels`` that are not ignored; ``next`` ones, where a row's first is none; ``rows``; or a ``sum`` over
            rows, of which two add up.
    """

    over: Literal["labels", "next", "rows", "sum"]

    @staticmethod
    def labels(*, shifted: bool) -> Rule:
        """Return the rule of a cross-entropy."""
        return NEXT if shifted else LABELS

    @staticmethod
    def rows() -> Rule:
        """Return the rule of a mean over rows."""
        return ROWS

    def count(self, labels: Tensors) -> float:
        """Return the count of a batch's labels (those of the first name)."""
        value = next(iter(labels.values()))
        if self.over in ("rows", "sum") or not value.dim():
            return float(len(value)) if value.dim() else 1.0
        counted = value[..., 1:] if self.over == "next" else value
        return float(counted.ne(IGNORED).sum()) if not counted.is_floating_point() else float(counted.numel())


LABELS, NEXT, ROWS, SUM = Rule("labels"), Rule("next"), Rule("rows"), Rule("sum")


def rule_of(model: nn.Module, loss: TaskLoss, inputs: Tensors, labels: Tensors) -> Rule | None:
    """Return what the loss is a mean over, None where two rows' losses do not tell that of both.

    Args:
        model: gives the outputs.
        loss: of outputs, labels and inputs.
        inputs: by name.
        labels: by name, of at least two rows.
    """
    tensors = [*inputs.values(), *labels.values()]
    if any(not value.dim() or len(value) < 2 for value in tensors):
        return None
    inputs, labels = _cut(inputs, slice(0, 2)), _cut(labels, slice(0, 2))
    with torch.no_grad(), torch.random.fork_rng(), mode(model, False):
        outputs = leaves(model(**inputs))
    outputs = {name: value for name, value in outputs.items() if value.dim() and len(value) == 2}
    for tags in (_unequal(labels), labels):
        if tags is None:
            continue
        try:
            both, first, second = (
                float(loss(_cut(outputs, part), _cut(tags, part), _cut(inputs, part)))
                for part in (slice(0, 2), slice(0, 1), slice(1, 2))
            )
        except (DataError, InputError, KeyError, RuntimeError):
            continue  # these labels, or one row alone, are nothing that the loss takes
        for rule in (LABELS, NEXT, ROWS, SUM):
            one, other = rule.count(_cut(tags, slice(0, 1))), rule.count(_cut(tags, slice(1, 2)))
            whole = 1.0 if rule is SUM else max(one + other, 1.0)
            one, other = (1.0, 1.0) if rule is SUM else (one, other)
            added = (one * first if one else 0.0) + (
                other * second if other else 0.0
            )  # 0 labels: not a number
            if abs(both - added / whole) <= CLOSE * abs(both):
                return rule
    return None


def _cut(tensors: Tensors, part: slice) -> Tensors:
    return {name: value[part] for name, value in tensors.items()}


def _unequal(labels: Tensors) -> Tensors | None:
    """Return labels of which some of the second row's alone are ignored, so that rows count unequally; or None."""
    name, value = next(iter(labels.items()))
    if value.is_floating_point() or value.dim() < 2 or value.shape[1] < 3:
        return None
    value = value.clamp(min=0)
    value[1, -(value.shape[1] // 2) :] = IGNORED
    return {**labels, name: value}
