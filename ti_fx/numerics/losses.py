"""The distillation losses as plain functions over tensors; the graph calls them in its loss nodes.

Sources: TernaryBERT (Zhang et al., EMNLP 2020), section 3.2, and Teacher Intervention (arXiv 2302.11812), section 4.
Each is computed in at least float32 and returns a scalar; the teacher's side carries no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ti_fx.numerics.precision import at_least_float32


def soft_cross_entropy(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross-entropy of the student's logits against the teacher's distribution; a mean over everything but classes.

    Logits of one class are a regression output: their mean squared error instead.

    Args:
        student: logits, shape ``(..., classes)``.
        teacher: logits of the same shape.
        mask: None, or ``(batch, tokens)`` with nonzero at the tokens that count (for logits per token).
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    if student.shape[-1] == 1:
        return mean_squared_error(student, teacher, mask)
    each = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
    return _mean(each, mask if mask is not None and each.dim() == 2 else None)


def mean_squared_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of the squared difference over all entries, or over the entries of tokens that ``mask`` keeps.

    Args:
        student: any shape; if masked, the mask's dimensions and then the features.
        teacher: the same shape.
        mask: None, or ``(batch, tokens)``, or ``(batch * tokens,)``; values without features are not masked.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    if mask is None or student.dim() <= mask.dim():
        return torch.nn.functional.mse_loss(student, teacher)
    each = torch.nn.functional.mse_loss(student, teacher, reduction="none")
    return _mean(each.flatten(mask.dim()).mean(-1), mask)


def scores_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of attention scores, with positions at or below -100 zeroed on each side.

    Args:
        student: scores before softmax, mask added, shape ``(batch, heads, queries, keys)``.
        teacher: the same shape.
        mask: None, or ``(batch, queries)`` with nonzero at the query tokens that count.
    """
    # threshold: the value where it is above -100, else 0
    student, teacher = (
        torch.nn.functional.threshold(at_least_float32(value), -100.0, 0.0) for value in (student, teacher)
    )
    if mask is None or student.dim() != 4:
        return torch.nn.functional.mse_loss(student, teacher)
    each = torch.nn.functional.mse_loss(student, teacher, reduction="none")
    return _mean(each.mean((1, 3)), mask)


COMPARE = (soft_cross_entropy, mean_squared_error, scores_error)  # a student's value with the teacher's


def _mean(per_token: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return per_token.mean()
    kept = (mask != 0).to(per_token.dtype)
    return (per_token * kept).sum() / kept.sum().clamp(min=1)


def masks_tokens(loss: Callable[..., Tensor], student: Tensor, mask: Tensor | None) -> bool:
    """Whether one of these losses is a mean over the tokens that ``mask`` keeps, of a student's value as shaped.

    Else it is a mean over all entries.
    """
    if mask is None:
        return False
    if loss is scores_error:
        return student.dim() == 4
    if loss is soft_cross_entropy and student.shape[-1] != 1:
        return student.dim() == 3
    return student.dim() > mask.dim()


def nothing(value: Tensor) -> Tensor:
    """Return 0, float32: the losses of a graph that compares nothing with a teacher."""
    return torch.zeros((), dtype=torch.float32, device=value.device)


def total(values: Sequence[Tensor]) -> Tensor:
    """Add scalars in order."""
    result = values[0]
    for value in values[1:]:
        result = result + value
    return result


def weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Add scalars times their weights, in order."""
    return total([value * weight for value, weight in zip(values, weights, strict=True)])
