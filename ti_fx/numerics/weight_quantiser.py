"""A weight quantiser says how a weight becomes codes and a scale: in training, where it is packed, and in the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ti_fx.numerics.weight_codes import GRANULARITIES, Granularity


@dataclass(frozen=True)
class Learned:
    """A tensor that a weight quantiser learns: a Parameter of the student beside the weight.

    Attributes:
        name: the last part of the Parameter's.
        start: its first value, of the weight and the granularity; its shape is that of the scale.
    """

    name: str
    start: Callable[[Tensor, Granularity], Tensor]


@dataclass(frozen=True)
class WeightQuantiser:
    """One way to make a weight ternary or binary.

    Attributes:
        name: of the method, as a recipe names it.
        function: the fake-quantiser, ``function(weight, granularity=..., clip=...)`` of the same shape and dtype with
            its surrogate gradient: what the graph calls, and what the method is found by. It can be imported by its
            name. One that learns tensors takes them after the weight, and no clip.
        codes: int8 codes and the scale, of the same arguments; codes times scale is what ``function`` gives. One with
            ``shifts`` gives what is added to that, too.
        formula: one line for people. source: where it is from.
        values: which codes there are: -1, 0 and 1, or -1 and 1.
        learned: the tensors that it learns.
        shifts: whether something is added to codes times scale.
        multiple: of what the last dimension must be a multiple.
        granularities: what may share a scale.
    """

    name: str
    function: Callable[..., Tensor]
    codes: Callable[..., tuple[Tensor, ...]]
    formula: str
    source: str
    values: Literal["ternary", "binary"] = "ternary"
    learned: tuple[Learned, ...] = ()
    shifts: bool = False
    multiple: int = 1
    granularities: tuple[Granularity, ...] = GRANULARITIES
