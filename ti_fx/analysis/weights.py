"""``stored_weights`` says what Ternarize would do with every stored tensor of a model, and why it leaves some alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.ir.edit import tensor
from ti_fx.numerics import codes
from ti_fx.numerics.weight_codes import Granularity, scale_shape
from ti_fx.numerics.weight_quantiser import WeightQuantiser
from ti_fx.passes import Ternarize

SCALE_BYTES = 4  # a scale is stored in float32


@dataclass(frozen=True)
class StoredWeight:
    """One Parameter that the graph reads (a tied one once), and what becomes of it.

    Attributes:
        name: in the source model's own names.
        shape: numbers. dtype: ``float32``.
        encoding: ``ternary, a scale per tensor`` (``binary``; ``row``, ``group-64``), or ``kept``.
        reason: what it is, or why it is kept.
        bytes_before: as it is now. bytes_after: packed at two bits a code, scales included.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    reason: str
    bytes_before: int
    bytes_after: int

    @property
    def is_ternary(self) -> bool:
        """Whether the weight becomes ternary."""
        return self.encoding != "kept"


def stored_weights(gm: GraphModule, ternarize: Ternarize | None = None) -> list[StoredWeight]:
    """Return every Parameter of the student, in the order in which the graph reads them.

    Args:
        gm: a captured graph.
        ternarize: the pass with its options; None: its defaults.

    Raises:
        SelectionError: one of the pass's skip globs matches nothing.
    """
    ternarize = ternarize or Ternarize()
    quantiser = ternarize.quantiser
    rows: dict[str, StoredWeight] = {}
    for node, fate in ternarize.fates(gm).items():
        name = str(node.target)
        value = tensor(gm, name)
        if name in rows or not isinstance(value, nn.Parameter):
            continue
        size = value.numel() * value.element_size()
        encoding = (
            "kept" if fate.granularity is None else f"{quantiser.values}, a scale per {fate.granularity}"
        )
        after = size if fate.granularity is None else _packed_bytes(value, fate.granularity, quantiser)
        dtype = str(value.dtype).removeprefix("torch.")
        rows[name] = StoredWeight(name, tuple(value.shape), dtype, encoding, fate.reason, size, after)
    return list(rows.values())


def _packed_bytes(value: Tensor, granularity: Granularity, quantiser: WeightQuantiser) -> int:
    scales = math.prod(scale_shape(value.shape, granularity)) * (2 if quantiser.shifts else 1)
    return -(-value.numel() // codes.CODES_PER_BYTE) + SCALE_BYTES * scales
