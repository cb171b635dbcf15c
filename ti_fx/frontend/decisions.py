"""Records what a model decides in Python by values that it computes: ``if not mask.any()``, ``if h.isnan().any()``.

One graph holds one outcome of each. It is recorded on the example and replayed in the trace, and the graph checks its
condition at every run (``ti_fx.frontend.checks``), so that inputs that decide otherwise are refused instead of computed
by the wrong branch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ti_fx.frontend.model_checks import raised_at
from ti_fx.frontend.source_lines import caller, short
from ti_fx.ir.checks import MARK, REFUSES


@dataclass(frozen=True)
class Decision:
    """A value that Python read.

    Attributes:
        where: ``file:line`` that read it.
        outcome: what it was on the example.
    """

    where: str
    outcome: bool | int | float

    def __str__(self) -> str:
        return f"{short(self.where)} reads {self.outcome}"

    @property
    def message(self) -> str:
        """What a run that decides otherwise is told."""
        said = raised_at(self.where)
        if said is not None and isinstance(self.outcome, bool):
            return f"{REFUSES}{said.rstrip('.')} ({short(self.where)}); give inputs that the model takes"
        return (
            f"{MARK}these inputs decide otherwise at {short(self.where)}, which read {self.outcome} on the captured "
            "example, and the graph follows that; capture with an example that decides like these inputs"
            + (f"; the model raises there, if it does: {said}" if said else "")
        )


def count_of(mask: Tensor) -> Tensor:
    """Return at how many places a mask is true: the size of what it selects."""
    return mask.sum()


def _itself(value: Tensor) -> Tensor:
    return value


# What Python reads a truth value by, and the tensor of what it reads.
_TRUTH_READS: dict[Any, Callable[..., Tensor]] = {
    Tensor.__bool__: lambda value: value != 0,
    Tensor.item: _itself,
    Tensor.__contains__: lambda value, element: (value == element).any(),
    Tensor.__len__: lambda value: torch.scalar_tensor(value.shape[0]),
    torch.is_nonzero: lambda value: value != 0,
    Tensor.is_nonzero: lambda value: value != 0,
}
# The same for numbers, too.
READS: dict[Any, Callable[..., Tensor]] = {
    **_TRUTH_READS,
    Tensor.__int__: _itself,
    Tensor.__index__: _itself,
    Tensor.__float__: _itself,
    count_of: count_of,
}


class Decisions:
    """The values that Python reads in one forward, line by line: recorded first, replayed then.

    Attributes:
        numbers: whether numbers count, or truth values alone.
        recording: whether what is read is recorded, or replayed.
        by_line: the decisions of each ``file:line``, in the order in which they were read.
    """

    def __init__(self, numbers: bool = False) -> None:
        self.numbers = numbers
        self.recording = True
        self.by_line: dict[str, list[Decision]] = {}
        self._replayed: dict[str, int] = {}  # how many of each line
        self._reads = READS if numbers else _TRUTH_READS

    def restart(self) -> None:
        """Begin again with the first, to replay them."""
        self.recording, self._replayed = False, {}

    def concerns(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether a call is such a read."""
        if func not in self._reads:
            return False
        return self.numbers or func is not Tensor.item or args[0].dtype == torch.bool

    def record(self, outcome: bool | int | float) -> None:
        """Note what the model's code read just now."""
        where = caller()
        self.by_line.setdefault(where, []).append(Decision(where, outcome))

    def replay(self) -> Decision | None:
        """Return what was read here on the example; None where only a trace reads."""
        where = caller()
        known = self.by_line.get(where, [])
        position = self._replayed.get(where, 0)
        self._replayed[where] = position + 1
        return known[position] if position < len(known) else None
