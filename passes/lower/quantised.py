"""Codes, scale and zero point of a value: quantised once, whoever reads them."""

from __future__ import annotations

import operator

from torch.fx import Node

from ti_fx.ir.edit import call
from ti_fx.numerics.quantiser import Quantiser


def quantised(value: Node, quantiser: Quantiser, before: Node) -> list[Node]:
    """Return codes, scale and zero point of a value; they are inserted before a node unless they are there.

    Args:
        value: what is quantised.
        quantiser: how.
        before: the fake-quantiser's node, which reads what the quantiser learned.
    """
    codes, arguments = quantiser.codes, (value, *before.args[1:], *quantiser.options)
    assert codes is not None
    whole = next((user for user in value.users if user.target is codes and user.args == arguments), None)
    if whole is None:
        whole = call(before, codes, arguments)
        return [call(before, operator.getitem, (whole, index)) for index in range(3)]
    parts = {part.args[1]: part for part in whole.users if part.target is operator.getitem}
    return [parts[index] for index in range(3)]
