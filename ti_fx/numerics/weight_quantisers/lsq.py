"""LSQ: the step of ternary weights is learned with them."""

from __future__ import annotations

from torch import Tensor

from ti_fx.numerics.learned_steps import Stretch, stretched, stretched_codes
from ti_fx.numerics.weight_codes import Granularity, mean_magnitude
from ti_fx.numerics.weight_quantiser import Learned, WeightQuantiser

_STRETCH = Stretch(levels=1.0, edge=1.0, edge_is_inside=False, shared=True)


def lsq(weight: Tensor, step: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """Return ``codes * s``: codes = W / s, clamped to [-1, 1] and rounded, half to even.

    Gradients: of W, straight-through where |W / s| < 1 and zero elsewhere; of s, the sum over the N weights that share
    it of codes - W / s within, and of the sign of W beyond, over the square root of N * Qp; Qp, the largest code, is 1.
    s starts as 2 mean|W| / sqrt(Qp) and counts as 1e-5 at least.

    Source: Learned Step Size Quantization (Esser et al., ICLR 2020, arXiv 1902.08153), section 2.

    Args:
        weight: floating, any shape of at least one dimension.
        step: s, ``()``, ``(rows, 1, ...)`` or ``(..., groups)`` by the granularity.
        granularity: what shares a step.
    """
    return stretched(weight, step, granularity, _STRETCH)


def lsq_codes(weight: Tensor, step: Tensor, granularity: Granularity = "tensor") -> tuple[Tensor, Tensor]:
    """Return int8 codes and the scale of :func:`lsq`."""
    return stretched_codes(weight, step, granularity, _STRETCH)


def _start(weight: Tensor, granularity: Granularity) -> Tensor:
    return 2 * mean_magnitude(weight, granularity)


LSQ = WeightQuantiser(
    "lsq",
    lsq,
    lsq_codes,
    formula="W / s, clamped to [-1, 1] and rounded; scale: s, which is learned",
    source="Learned Step Size Quantization, arXiv 1902.08153",
    learned=(Learned("step", _start),),
)
