"""ParetoQ's stretched elastic quantiser: three levels of equal width over a learned range."""

from __future__ import annotations

from torch import Tensor

from ti_fx.numerics.learned_steps import Stretch, stretched, stretched_codes
from ti_fx.numerics.weight_codes import Granularity, largest_magnitude
from ti_fx.numerics.weight_quantiser import Learned, WeightQuantiser

_STRETCH = Stretch(levels=1.5, edge=0.99, edge_is_inside=True, shared=False)


def seq(weight: Tensor, bound: Tensor, granularity: Granularity = "tensor") -> Tensor:
    """Return ``codes * a / 1.5``: codes = 1.5 * (W / a, clamped to [-0.99, 0.99]), rounded, half to even.

    Gradients: of W, straight-through where |W / a| <= 0.99 and zero elsewhere; of a, the sum over the weights that
    share it of codes / 1.5 - W / a within, and of the sign of W beyond, over the square root of how many numbers W
    has (all of them, as the authors' code has it). a starts as max|W| and counts as 1e-5 at least.

    Source: ParetoQ (Liu et al., arXiv 2502.02631), StretchedElasticQuant of its code, the ternary case.

    Args:
        weight: floating, any shape of at least one dimension.
        bound: a, ``()``, ``(rows, 1, ...)`` or ``(..., groups)`` by the granularity.
        granularity: what shares a bound; the authors' is ``row``.
    """
    return stretched(weight, bound, granularity, _STRETCH)


def seq_codes(weight: Tensor, bound: Tensor, granularity: Granularity = "tensor") -> tuple[Tensor, Tensor]:
    """Return int8 codes and the scale of :func:`seq`."""
    return stretched_codes(weight, bound, granularity, _STRETCH)


SEQ = WeightQuantiser(
    "seq",
    seq,
    seq_codes,
    formula="1.5 W / a, W / a clamped to [-0.99, 0.99], rounded; scale: a / 1.5, a is learned",
    source="ParetoQ, arXiv 2502.02631",
    learned=(Learned("bound", largest_magnitude),),
)
