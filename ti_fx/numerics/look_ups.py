"""A look-up in a table that is quantised row by row quantises only the rows that it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ti_fx.numerics.weight_quantisers import get_method


def quantised_embedding(weight: Tensor, indices: Tensor, *options: Any, method: str, clip: float) -> Tensor:
    """Return ``embedding(quantised(weight, "row"), indices, *options)``, quantising only what is looked up.

    Values and gradients are the same bit for bit, as each row has its own scale.

    Args:
        weight: floating, of two dimensions.
        indices: integers, any shape.
        options: of ``torch.ops.aten.embedding``.
        method: the name of a weight quantiser without learned tensors.
        clip: as of the quantiser.
    """
    rows = torch.ops.aten.embedding.default(weight, indices, *options)
    return get_method(method).function(rows.flatten(0, -2), granularity="row", clip=clip).view_as(rows)
