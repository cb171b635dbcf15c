"""Error-feedback rounding finds the ternary codes and scales of a weight by what its products give on real inputs.

All of it minimises ``trace((Q - T) H (Q - T)')`` over ternary ``Q = codes * scale``, where T is the target and H the
second moment of the product's inputs. Sources: GPTQ (Frantar et al., arXiv 2210.17323) for the rounding of one input
after another, QuantEase (Behdin et al., arXiv 2309.01885) for the descent over single codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ti_fx.numerics.precision import at_least_float32
from ti_fx.numerics.ternary_weights import ternary_codes
from ti_fx.numerics.weight_codes import CLIP

BLOCK = 128  # inputs between two updates of all that follow
FACTORS = (0.85, 1.0, 1.2, 1.45, 1.75)  # of the scale that TWN would give: those that rounding is tried with


def damped(moment: Tensor, damping: float) -> Tensor:
    """Return the second moment with ``damping`` times its mean diagonal added to the diagonal; at least a little.

    Args:
        moment: ``(inputs, inputs)``, symmetric, not negative.
        damping: 0 or more.
    """
    mean = float(moment.diagonal().mean())
    added = max(damping, 1e-6) * mean if mean > 0 else 1.0
    return moment + added * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def regression_target(weight: Tensor, moment: Tensor, cross: Tensor, damping: float) -> Tensor:
    """Return the weight that fits the wanted outputs best on these inputs, in float64: ridge regression.

    It minimises ``|X T' - Y|^2 + added * |T - weight|^2``, with ``added`` as :func:`damped` adds it.

    Args:
        weight: ``(outputs, inputs)``, what the target is pulled to.
        moment: ``X'X``, ``(inputs, inputs)``, float64.
        cross: ``X'Y``, ``(inputs, outputs)``, float64.
        damping: as of :func:`damped`.
    """
    heavy = damped(moment, damping)
    added = heavy.diagonal() - moment.diagonal()
    wanted = cross + added.unsqueeze(1) * weight.double().T
    return torch.cholesky_solve(wanted, cholesky(heavy)).T


def error(quantised: Tensor, target: Tensor, moment: Tensor) -> Tensor:
    """Return ``(Q - T) H (Q - T)'`` of each row: shape ``(outputs,)``."""
    difference = quantised - target
    return ((difference @ moment) * difference).sum(1)


def inverse_factor(moment: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of a positive definite matrix, computed in float64."""
    wide = moment.double()
    inverse = torch.cholesky_inverse(cholesky(wide))
    return cholesky(inverse).T.contiguous().to(moment.dtype)


def cholesky(moment: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a second moment.

    Where rounding has left it no positive definite matrix (rows that are all alike, say), as little is added to its
    diagonal as makes it one.

    Raises:
        LinAlgError: it holds what is no number.
    """
    factor, info = torch.linalg.cholesky_ex(moment)
    size = max(float(moment.diagonal().abs().max()), torch.finfo(moment.dtype).tiny)
    for power in range(-12, 3):
        if not int(info):
            break
        shifted = moment + 10.0**power * size * torch.eye(
            len(moment), dtype=moment.dtype, device=moment.device
        )
        factor, info = torch.linalg.cholesky_ex(shifted, check_errors=power == 2)
    found: Tensor = factor
    return found


def feedback_codes(target: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
    """Round one input after another; the error of each is made up for by the inputs that follow (GPTQ).

    Args:
        target: ``(outputs, inputs)``.
        scale: broadcasts to it; 0 gives codes of 0.
        factor: of :func:`inverse_factor`, ``(inputs, inputs)``.

    Returns:
        codes in {-1, 0, 1} as floats, ``(outputs, inputs)``.
    """
    left = target.clone()
    steps = torch.where(scale > 0, scale, torch.full_like(scale, float("inf"))).expand_as(target)
    sizes = scale.expand_as(target)
    codes = torch.zeros_like(target)
    for start, stop in _blocks(target.shape[1]):
        errors = torch.zeros_like(left[:, start:stop])
        for index in range(start, stop):
            codes[:, index] = (left[:, index] / steps[:, index]).round_().clamp_(-1, 1)
            lost = (left[:, index] - codes[:, index] * sizes[:, index]) / factor[index, index]
            left[:, index:stop].addr_(lost, factor[index, index:stop], alpha=-1)
            errors[:, index - start] = lost
        left[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return codes


def descended_codes(codes: Tensor, scale: Tensor, target: Tensor, moment: Tensor) -> Tensor:
    """Set each code to the best one given all others, one input after another, once over all; never a larger error.

    Args:
        codes: ``(outputs, inputs)`` as floats.
        scale: broadcasts to it.
        target: ``(outputs, inputs)``.
        moment: ``(inputs, inputs)``, positive on its diagonal.
    """
    codes = codes.clone()
    sizes = scale.expand_as(target)
    steps = torch.where(sizes > 0, sizes, torch.full_like(sizes, float("inf")))
    slope = (codes * sizes - target) @ moment
    diagonal = moment.diagonal()
    for start, stop in _blocks(target.shape[1]):
        own = slope[:, start:stop].clone()
        before = codes[:, start:stop].clone()
        for index in range(start, stop):
            old = codes[:, index]
            wanted = old * sizes[:, index] - own[:, index - start] / diagonal[index]
            new = (wanted / steps[:, index]).round_().clamp_(-1, 1)
            own.addr_((new - old) * sizes[:, index], moment[index, start:stop])
            codes[:, index] = new
        slope.addmm_((codes[:, start:stop] - before) * sizes[:, start:stop], moment[start:stop])
    return codes


def fitted_scale(codes: Tensor, scale: Tensor, target: Tensor, moment: Tensor) -> Tensor:
    """Return the scales of least error for given codes, not negative; where all codes are 0, the scale is as it was.

    Args:
        codes: ``(outputs, inputs)`` as floats.
        scale: ``()``, ``(outputs, 1)`` or ``(1, inputs)``, which says what shares a scale.
        target: ``(outputs, inputs)``.
        moment: ``(inputs, inputs)``.
    """
    product = codes @ moment
    if scale.dim() == 2 and scale.shape[0] == 1 and scale.shape[1] > 1:
        together = moment * (codes.T @ codes)
        used = together.diagonal() > 0
        together.diagonal()[~used] = 1.0
        wanted = (codes * (target @ moment)).sum(0)
        found = torch.linalg.solve(together.double(), wanted.double())
        return torch.where(used, found.to(scale.dtype).clamp(min=0), scale[0]).unsqueeze(0)
    over = (0, 1) if scale.dim() == 0 else (1,)
    size = (product * codes).sum(over).view_as(scale)
    found = (product * target).sum(over).view_as(scale) / size.clamp(min=torch.finfo(size.dtype).tiny)
    return torch.where(size > 0, found.clamp(min=0), scale)


def ternary_by_feedback(
    target: Tensor, moment: Tensor, scale: Tensor, sweeps: int = 2
) -> tuple[Tensor, Tensor]:
    """Return ternary codes and scales of small error ``trace((Q - T) H (Q - T)')``.

    Rounding with error feedback is tried at several scales (``FACTORS`` times the given one); the best is improved by
    ``sweeps`` of descent over single codes. Inputs are taken in the order of their second moment, largest first.

    Args:
        target: ``(outputs, inputs)``, float32 or float64.
        moment: ``(inputs, inputs)`` of the same dtype, positive definite.
        scale: a first guess, ``()``, ``(outputs, 1)`` or ``(1, inputs)``; what shares a scale goes on sharing it.
        sweeps: of descent.

    Returns:
        codes: in {-1, 0, 1} as floats, ``(outputs, inputs)``.
        scale: of the shape given.
    """
    order = moment.diagonal().argsort(descending=True)
    by_input = scale.dim() == 2 and scale.shape[0] == 1
    target, moment = target[:, order], moment[order][:, order]
    scale = scale[:, order] if by_input else scale
    factor = inverse_factor(moment)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for times in FACTORS:
        codes = feedback_codes(target, scale * times, factor)
        size = fitted_scale(codes, scale * times, target, moment)
        best = _better(best, (error(codes * size, target, moment), codes, size), scale)
    assert best is not None
    _, codes, size = best
    for _ in range(sweeps):
        codes = descended_codes(codes, size, target, moment)
        size = fitted_scale(codes, size, target, moment)
    codes = torch.where(size > 0, codes, torch.zeros_like(codes))
    back = order.argsort()
    return codes[:, back], size[:, back] if by_input else size


def _better(
    known: tuple[Tensor, Tensor, Tensor] | None, found: tuple[Tensor, Tensor, Tensor], scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the better of two (error, codes, scale): row by row where each row has a scale of its own."""
    if known is None:
        return found
    if scale.dim() == 2 and scale.shape[0] == len(found[0]) and scale.shape[1] == 1:
        rows = (found[0] < known[0]).unsqueeze(1)
        return (
            torch.minimum(found[0], known[0]),
            torch.where(rows, found[1], known[1]),
            torch.where(rows, found[2], known[2]),
        )
    return found if bool(found[0].sum() < known[0].sum()) else known


def latents_on_grid(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the latent weight that lies on its own ternary values."""
    return codes * scale


def latents_in_cells(codes: Tensor, scale: Tensor, weight: Tensor, margin: float = 0.05) -> Tensor:
    """Return the latent weight nearest to ``weight`` that has these codes and scales by TWN, within a margin.

    With t the threshold that the result has: entries of code 0 lie within t * (1 - margin), all others beyond
    t * (1 + margin) on their side, with a mean magnitude of ``scale``.

    Args:
        codes: ``(rows, columns)`` in {-1, 0, 1} as floats.
        scale: ``()``, or ``(rows, 1)``.
        weight: ``(rows, columns)``.
        margin: the share of the threshold that is kept free on either side.
    """
    over = (1,) if scale.dim() else (0, 1)
    count = codes.shape[1] if scale.dim() else codes.numel()
    kept = codes.abs()
    share = kept.sum(over, keepdim=True) / count
    threshold = 0.7 * scale * share  # where all zeros lie at 0; it grows from here to its fixed point
    for _ in range(60):
        inner = threshold * (1 - margin)
        small = torch.minimum(weight.abs(), inner) * (1 - kept)
        threshold = 0.7 * (scale * share + small.sum(over, keepdim=True) / count)
    outer = threshold * (1 + margin)
    number = kept.sum(over, keepdim=True).clamp(min=1)
    room = (scale - outer).clamp(min=0)
    excess = codes * weight - outer
    low = room - excess.abs().amax(over, keepdim=True)
    high = room + excess.abs().amax(over, keepdim=True)
    for _ in range(40):  # the shift with which the mean magnitude is the scale
        shift = (low + high) / 2
        is_low = ((excess + shift).clamp(min=0) * kept).sum(over, keepdim=True) / number < room
        low, high = torch.where(is_low, shift, low), torch.where(is_low, high, shift)
    beyond = (excess + high).clamp(min=0) * kept
    mean = beyond.sum(over, keepdim=True) / number
    stretched = torch.where(
        mean > 0, beyond * (room / mean.clamp(min=torch.finfo(mean.dtype).tiny)), room * kept
    )
    zeros = torch.minimum(torch.maximum(weight, -inner), inner) * (1 - kept)
    return torch.where(share > 0, codes * (outer + stretched) + zeros, torch.zeros_like(weight))


def has_codes(latent: Tensor, codes: Tensor, scale: Tensor, granularity: str, clip: float = CLIP) -> bool:
    """Whether the training quantiser makes exactly these codes of a latent weight, and these scales up to rounding."""
    found, size = ternary_codes(latent, granularity, clip)  # type: ignore[arg-type]
    tolerance = 4 * torch.finfo(latent.dtype).eps
    wanted = at_least_float32(scale).to(size.dtype).expand_as(size)
    near = (size - wanted).abs() <= tolerance * wanted.abs() + torch.finfo(size.dtype).tiny
    blank = codes.reshape(len(codes), -1).abs().sum(1).view(-1, *[1] * (codes.dim() - 1)) == 0
    near = near | (blank if size.dim() else blank.all())
    return bool(torch.equal(found, codes.to(torch.int8))) and bool(near.all())


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, BLOCK):
        yield start, min(start + BLOCK, size)
