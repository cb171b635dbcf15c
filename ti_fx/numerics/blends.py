"""A blend reads a share of the teacher's value and the rest of the student's; at both ends it is one of them, exactly.

Likewise a weight that is phased in is read by a share of its quantised values. The share is λ, from 0 to 1: a tensor,
so that it moves without another graph. At 1 and at 0 values are chosen and not multiplied, so infinities, NaN and the
signs of zeros pass as they would without a blend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def blend(student: Tensor, teacher: Tensor, share: Tensor) -> Tensor:
    """Return ``share * teacher + (1 - share) * student``: the teacher's bits where the share is 1, the student's at 0.

    The gradient of ``student`` is ``(1 - share)`` of the result's: all of it at 0, zero at 1. The teacher has none.

    Args:
        student: floating, any shape.
        teacher: the same shape.
        share: from 0 to 1, of a shape that broadcasts to theirs.
    """
    result: Tensor = _Blend.apply(student, teacher, share)  # type: ignore[no-untyped-call]
    return result


def phase_in(latent: Tensor, quantised: Tensor, share: Tensor) -> Tensor:
    """Return ``latent + share * (quantised - latent)``: the quantised bits where the share is 1, the latent ones at 0.

    Of the result's gradient ``share`` goes to ``quantised``, and the rest to ``latent``.

    Args:
        latent: floating, any shape.
        quantised: the same shape: made of ``latent``.
        share: from 0 to 1, [].
    """
    result: Tensor = _PhaseIn.apply(latent, quantised, share)  # type: ignore[no-untyped-call]
    return result


def detach_by(value: Tensor, share: Tensor) -> Tensor:
    """Return ``value``, and stop so much of its gradient as the share says: all of it at 1, nothing at 0."""
    result: Tensor = _DetachBy.apply(value, share)  # type: ignore[no-untyped-call]
    return result


def route(value: Tensor, detached: Tensor, share: Tensor) -> Tensor:
    """Return ``value``; the share of its gradient goes to ``detached``, and the rest to ``value``.

    Args:
        value: floating, any shape.
        detached: the same numbers, computed from a detached input: what made them is trained, and nothing below.
        share: from 0 to 1, [].
    """
    result: Tensor = _Route.apply(value, detached, share)  # type: ignore[no-untyped-call]
    return result


def _part(gradient: Tensor, share: Tensor) -> Tensor:
    """Return ``share * gradient``: zero where the share is 0, and the gradient's own bits where it is 1."""
    some = torch.where(share == 0, gradient.new_zeros(()), gradient * share)
    return torch.where(share == 1, gradient, some)


def _mixed(own: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Return ``own + share * (other - own)``: at both ends the one or the other in every bit."""
    mixed = torch.lerp(own, other, share)
    return torch.where(share == 1, other, torch.where(share == 0, own, mixed))


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, share: Tensor) -> Tensor:
        share, teacher = share.to(student.dtype), teacher.to(student.dtype)
        ctx.save_for_backward(share)
        return _mixed(student, teacher, share)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (share,) = ctx.saved_tensors
        return _part(gradients[0], 1 - share), None, None


class _PhaseIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, quantised: Tensor, share: Tensor) -> Tensor:
        share, quantised = share.to(latent.dtype), quantised.to(latent.dtype)
        ctx.save_for_backward(share)
        return _mixed(latent, quantised, share)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (share,) = ctx.saved_tensors
        return _part(gradients[0], 1 - share), _part(gradients[0], share), None


class _DetachBy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(share.to(value.dtype))
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (share,) = ctx.saved_tensors
        return _part(gradients[0], 1 - share), None


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, detached: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(share.to(value.dtype))
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (share,) = ctx.saved_tensors
        return _part(gradients[0], 1 - share), _part(gradients[0], share), None
