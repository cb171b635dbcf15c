"""How fast a training curve falls: the area under it, and the steps until it reaches a value."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ti_fx.errors import InputError


def area_under(steps: Sequence[float], values: Sequence[float]) -> float:
    """Return the mean height of a curve between its first and last step, by trapezia.

    The same unit as ``values``, so that runs of other lengths can be compared.

    Raises:
        InputError: fewer than two points, or steps that do not ascend.
    """
    _check(steps, values)
    trapezia = zip(steps, steps[1:], values, values[1:], strict=False)
    area = sum((end - start) * (left + right) / 2 for start, end, left, right in trapezia)
    return area / (steps[-1] - steps[0])


def steps_until(steps: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """Return where a curve first falls to ``target``, between two points by a straight line; None: it never does.

    Raises:
        InputError: fewer than two points, or steps that do not ascend.
    """
    _check(steps, values)
    if values[0] <= target:
        return steps[0]
    for start, end, left, right in zip(steps, steps[1:], values, values[1:], strict=False):
        if right <= target:
            return start + (end - start) * (left - target) / (left - right)
    return None


def _check(steps: Sequence[float], values: Sequence[float]) -> None:
    if len(steps) != len(values) or len(steps) < 2:
        raise InputError(
            f"a curve needs as many values as steps and at least two; got {len(steps)} and {len(values)}"
        )
    if any(end <= start for start, end in pairwise(steps)):
        raise InputError("the steps of a curve must ascend")
