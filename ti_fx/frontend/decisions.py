"""What a model decides in Python by values that are computed: ``if not mask.any()``, ``if not isfinite(h).all()``.

One graph holds one outcome of each. It is recorded on the example and replayed in the trace, and the graph checks its
condition at every run, so that inputs that decide otherwise are refused instead of computed by the wrong branch.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ti_fx.ir.checks import MARK


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
        return (
            f"{MARK}these inputs decide otherwise at {short(self.where)}, which read {self.outcome} on the captured "
            "example, and the graph follows that; capture with an example that decides like these inputs"
        )


class Decisions:
    """The values that Python reads in one forward, place by place: recorded first, replayed then."""

    def __init__(self, numbers: bool = False) -> None:
        self.taken: dict[str, list[Decision]] = {}
        self.replayed: dict[str, int] = {}
        self.reads = _READS if numbers else _BOOLEANS
        self.numbers = numbers
        self.recording = True

    def restart(self) -> None:
        """Begin again with the first, to replay them."""
        self.recording, self.replayed = False, {}

    def concerns(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether a call is such a read."""
        if func not in self.reads:
            return False
        return self.numbers or func is not Tensor.item or args[0].dtype == torch.bool

    def record(self, outcome: bool | int | float) -> None:
        """Note what the model's code read just now."""
        where = caller()
        self.taken.setdefault(where, []).append(Decision(where, outcome))

    def replay(self) -> Decision | None:
        """Return what was read here on the example; None where only a trace reads."""
        where = caller()
        known = self.taken.get(where, [])
        position = self.replayed[where] = self.replayed.get(where, -1) + 1
        return known[position] if position < len(known) else None


def check(decision: Decision, func: Any, args: tuple[Any, ...]) -> None:
    """Put a check into the graph that is being traced: this read gives the same as on the example."""
    value = _READS[func](*args)
    same = value == decision.outcome
    torch._assert_async(same.all(), decision.message)


def positions(mask: Tensor, count: int) -> list[Tensor]:
    """Return where a mask of fixed sizes is true, as one index per dimension, if it is so at ``count`` places.

    What ``nonzero`` gives, in sizes that don't depend on values.
    """
    flat = mask.flatten()
    places = torch.where(flat, flat.cumsum(0) - 1, count)
    every = torch.arange(flat.shape[0], device=mask.device)
    found = torch.zeros(count + 1, dtype=torch.long, device=mask.device).scatter(0, places, every)[:count]
    parts = []
    for size in reversed(mask.shape):
        parts.append(found % size)
        found = found // size
    return parts[::-1]


def count_of(mask: Tensor) -> Tensor:
    """Return at how many places a mask is true: the size of what it selects."""
    return mask.sum()


def caller() -> str:
    """Return ``file:line`` of the innermost frame that is neither torch's nor ours."""
    frames = traceback.extract_stack()
    outside = (
        frame for frame in reversed(frames) if not re.search(r"[/\\](torch|ti_fx)[/\\]", frame.filename)
    )
    frame = next(outside)
    return f"{frame.filename}:{frame.lineno}"


def short(where: str) -> str:
    """Return a place without what is the machine's own: graphs are compared between machines."""
    path, _, line = where.rpartition(":")
    _, installed, inside = path.replace("\\", "/").rpartition("site-packages/")
    return f"{inside if installed else inside.rpartition('/')[2]}:{line}"


def _itself(value: Tensor) -> Tensor:
    return value


# The reads, and the tensor that each reads.
_BOOLEANS: dict[Any, Callable[..., Tensor]] = {
    Tensor.__bool__: lambda value: value != 0,
    Tensor.item: _itself,
    Tensor.__contains__: lambda value, element: (value == element).any(),
    torch.is_nonzero: lambda value: value != 0,
    Tensor.is_nonzero: lambda value: value != 0,
}
_READS: dict[Any, Callable[..., Tensor]] = {
    **_BOOLEANS,
    Tensor.__int__: _itself,
    Tensor.__index__: _itself,
    Tensor.__float__: _itself,
    count_of: count_of,
}
