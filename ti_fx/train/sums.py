"""Losses are added up between two logs, and over an evaluation, so that every device reports the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ti_fx.numerics import losses
from ti_fx.train.model import TernaryModel
from ti_fx.train.objective import Batch, Whole
from ti_fx.train.shares import PartCounts

Reduce = Callable[[Tensor], Tensor]


class StepLosses:
    """The losses by name of the optimiser steps since the last log.

    Attributes:
        whole: the counts of the current step's batch; None: it has one micro-batch.
    """

    def __init__(self) -> None:
        self.whole: Whole | None = None
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def begin(self, whole: Whole | None) -> None:
        """Begin an optimiser step."""
        self.whole = whole
        self._steps += 1

    def add(self, found: Mapping[str, Tensor]) -> None:
        """Add the losses of a micro-batch."""
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()

    def means(self, mean_over_devices: Reduce) -> dict[str, float]:
        """Return each loss a step, over all devices, and begin anew; nothing where nothing was added."""
        found, steps = self._sums, max(self._steps, 1)
        self._sums, self._steps = {}, 0
        if not found:
            return {}
        values = mean_over_devices(torch.stack([value / steps for value in found.values()]))
        return dict(zip(found, values.tolist(), strict=True))


class Distillation:
    """The losses of a student without an intervention, over an evaluation's rows."""

    def __init__(self, counts: PartCounts) -> None:
        self.counts = counts
        self._sums = torch.zeros(len(counts.parts), dtype=torch.float64)
        self._counts = torch.zeros(len(counts.parts), dtype=torch.float64)
        self._rows = 0

    def add(self, model: TernaryModel, batch: Batch, rows: int) -> None:
        """Add the first rows of a batch."""
        if not rows:
            return
        inputs = {name: value[:rows] if value.dim() else value for name, value in batch.inputs.items()}
        result = model.distillation(inputs)
        values = [float(value) for parts in result["parts"].values() for value in parts]
        counts = self.counts.of(inputs)
        self._sums += counts * torch.tensor(values, dtype=torch.float64)
        self._counts += counts
        self._rows += rows

    def metrics(self, sum_over_devices: Reduce) -> dict[str, float]:
        """Return the weighted sum (of the empty name) and each loss (``_scores``); none where nothing was added."""
        if not self.counts.parts:
            return {}
        added = sum_over_devices(torch.cat([self._sums, self._counts, torch.tensor([float(self._rows)])]))
        if not added[-1]:
            return {}
        sums, counts = added[:-1].chunk(2)
        terms: dict[str, list[Tensor]] = {}
        weights: dict[str, float] = {}
        for part, value in zip(self.counts.parts, (sums / counts.clamp(min=1)).float(), strict=True):
            terms.setdefault(part.term, []).append(value)
            weights[part.term] = part.weight
        each = {term: losses.total(values) for term, values in terms.items()}
        whole = losses.weighted(list(each.values()), list(weights.values()))
        return {"": float(whole), **{f"_{term}": float(value) for term, value in each.items()}}
