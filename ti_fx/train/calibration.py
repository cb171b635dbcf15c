"""A trainer calibrates its student's ternary weights on rows of the training data, before the first step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from ti_fx.ir.edit import stored
from ti_fx.ir.inserted import quantised_weights
from ti_fx.ir.pipeline import Pipeline
from ti_fx.ir.roles import TEACHER_PREFIX
from ti_fx.passes import Calibrate
from ti_fx.train.order import has_order

Collate = Callable[[list[Any]], Mapping[str, Any]]


def is_rounded(gm: GraphModule) -> bool:
    """Return whether each ternary weight of a prepared graph is still its teacher's: nothing has trained or set it."""
    named = dict(gm.named_parameters(remove_duplicate=False)) | dict(gm.named_buffers(remove_duplicate=False))
    for node in quantised_weights(gm):
        weight = node.all_input_nodes[0]
        teacher = named.get(f"{TEACHER_PREFIX}{weight.target}")
        own = stored(gm, weight)
        if teacher is None or own is None or not torch.equal(own, teacher):
            return False
    return True


def calibrated(gm: GraphModule, one: Calibrate, dataset: Any, collate: Collate, seed: int) -> Calibrate:
    """Calibrate a prepared graph on rows that are drawn from a data set; return the pass, with its report.

    Args:
        gm: without an intervention; its values are changed.
        one: how, and on how many rows.
        dataset: rows as Trainer takes them, with or without numbers (of a stream the first rows are taken).
        collate: makes a batch of rows, on the graph's device.
        seed: of the draw.

    Raises:
        DataError: there are no rows. PreconditionError: the graph can't be calibrated; says why.
    """
    rows = _drawn(dataset, one.rows, seed)
    batches = [collate(rows[start : start + one.batch_size]) for start in range(0, len(rows), one.batch_size)]
    done = dataclasses.replace(one, data=batches, report=[])
    Pipeline(done)(gm)
    return dataclasses.replace(done, data=None)


def require_calibration(gm: GraphModule, one: Calibrate) -> None:
    """Refuse, before anything is trained, a graph that can't be calibrated.

    Raises:
        PreconditionError: says why.
    """
    dataclasses.replace(one, data=[]).requires(gm)


def _drawn(dataset: Any, count: int, seed: int) -> list[Any]:
    """Return rows in the order of their sizes, so that a batch has little padding."""
    if has_order(dataset):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [dataset[index] for index in order[:count]]
    else:
        rows = list(itertools.islice(iter(dataset), count))
    return sorted(rows, key=_size)


def _size(row: Any) -> int:
    values = row.values() if isinstance(row, Mapping) else (row,)
    return sum(len(value) for value in values if isinstance(value, Sequence) and not isinstance(value, str))
