"""Rows that a user gives in one of several forms become batches that a graph takes, checked one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ti_fx.errors import DataError, InputError, first_line
from ti_fx.ir.edit import constant_size, input_names
from ti_fx.ir.inputs import require_inputs


def as_batches(
    gm: GraphModule,
    data: Mapping[str, Tensor] | Iterable[Mapping[str, Any]],
    rows: int,
    batch_size: int = 32,
) -> list[dict[str, Tensor]]:
    """Return batches of the graph's inputs, of at most so many rows in all.

    Args:
        gm: a graph from ``ti_fx.capture``, prepared or not.
        data: one mapping of tensors (cut into batches along the dimension that is dynamic and first), or batches: a
            list, a DataLoader. What the graph does not take is left out.
        rows: how many are taken, from the front.
        batch_size: of one mapping's batches.

    Raises:
        DataError: there are no rows, or one holds NaN or infinity. InputError: the graph does not take them; names the
            batch.
    """
    names = input_names(gm)
    batches: list[dict[str, Tensor]] = []
    left = rows
    given: Iterable[Mapping[str, Any]] = _cut(gm, data, batch_size) if isinstance(data, Mapping) else data
    for index, batch in enumerate(given):
        if left <= 0:
            break
        if not isinstance(batch, Mapping):
            raise InputError(
                f"batch {index} of the data is a {type(batch).__name__}; give mappings of the graph's inputs: "
                f"{', '.join(names)}"
            )
        own = {name: batch[name] for name in names if name in batch}
        try:
            require_inputs(gm, (), own)
        except InputError as error:
            raise InputError(f"batch {index} of the data: {first_line(error)}") from None
        own = _first(gm, own, left)
        for name, value in own.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise DataError(
                    f"batch {index} of the data holds NaN or infinity in {name!r}; leave those rows out"
                )
        left -= _rows(gm, own)
        batches.append(own)
    if not batches:
        raise DataError("the data has 0 rows; give at least 1")
    return batches


def _with_rows(gm: GraphModule) -> list[str]:
    """Return the inputs whose first dimension is open: that of the rows."""
    found: dict[str, list[str]] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        shape = node.meta["val"].shape
        if len(shape) and constant_size(shape[0]) is None:
            found.setdefault(str(shape[0]), []).append(str(node.target))
    return next(iter(found.values()), [])


def _rows(gm: GraphModule, batch: Mapping[str, Tensor]) -> int:
    name = next(iter(_with_rows(gm)), None)
    value = next(iter(batch.values())) if name is None else batch[name]
    return len(value) if value.dim() else 1


def _first(gm: GraphModule, batch: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    sliced = _with_rows(gm)
    return {name: value[:rows] if name in sliced else value for name, value in batch.items()}


def _cut(gm: GraphModule, data: Mapping[str, Tensor], batch_size: int) -> Iterator[Mapping[str, Tensor]]:
    sliced = [name for name in _with_rows(gm) if isinstance(data.get(name), torch.Tensor)]
    if not sliced:
        yield data
        return
    for start in range(0, max(len(data[name]) for name in sliced), batch_size):
        yield {
            name: value[start : start + batch_size] if name in sliced else value
            for name, value in data.items()
        }
