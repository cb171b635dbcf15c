"""The distillation losses as plain functions over tensors; the graph calls them in its loss nodes.

Sources: TernaryBERT (Zhang et al., EMNLP 2020), section 3.2, and Teacher Intervention (arXiv 2302.11812), section 4;
each further loss names its own. Each is computed in at least float32 and returns a scalar; the teacher's side carries
no gradient. In the formulas s is the student's value and t the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ti_fx.numerics.precision import at_least_float32

_HIDDEN = -100.0  # a score at or below is hidden by a mask
_LOWEST = -1e30  # instead of minus infinity, which is no number where all of a row is hidden
_SMALLEST_VARIANCE = 1e-5  # that an error is divided by, as layer norm's


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Cross-entropy of the student's logits against the teacher's distribution; a mean over everything but classes.

    ``-T² Σ_c softmax(t / T)_c · log softmax(s / T)_c``. Logits of one class are a regression output: their mean squared
    error instead. Source of T: Hinton et al., arXiv 1503.02531.

    Args:
        student: logits, shape ``(..., classes)``.
        teacher: logits of the same shape.
        mask: None, or ``(batch, tokens)`` with nonzero at the tokens that count (for logits per token).
        temperature: T, above 0.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    if student.shape[-1] == 1:
        return mean_squared_error(student, teacher, mask)
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    each = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
    found = _mean(each, mask if mask is not None and each.dim() == 2 else None)
    return found if temperature == 1.0 else found * temperature**2


def kl_divergence(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Divergence of the student's distribution from the teacher's: the cross-entropy less the teacher's own entropy.

    ``T² Σ_c p_c (log p_c - log softmax(s / T)_c)`` with ``p = softmax(t / T)``. Arguments and mean as
    :func:`soft_cross_entropy`; the gradients are the same, and equal logits give 0.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    if student.shape[-1] == 1:
        return mean_squared_error(student, teacher, mask)
    each = _divergence(student / temperature, teacher / temperature) * temperature**2
    return _mean(each, mask if mask is not None and each.dim() == 2 else None)


def token_scaled_cross_entropy(
    student: Tensor, teacher: Tensor, mask: Tensor | None, ids: Tensor, temperature: float = 10.0
) -> Tensor:
    """Cross-entropy against the teacher's distribution in which tokens that the teacher finds hard count for more.

    Of each row ``Σ_n a_n · CE(softmax(t_n), s_n)`` with ``a = softmax_n(-log softmax(t_n)[ids_n+1] / τ)``: how the
    teacher fares with the token that follows. A mean over rows; the published code adds them up. Source: Kim et al.,
    "Token-Scaled Logit Distillation", NeurIPS 2023 (arXiv 2308.06744), section 4.

    Args:
        student: logits, shape ``(batch, tokens, vocabulary)``.
        teacher: logits of the same shape.
        mask: None, or ``(batch, tokens)`` with nonzero at the tokens that count.
        ids: the tokens that the logits are computed from, ``(batch, tokens)``.
        temperature: τ of the scales, above 0.
    """
    student, teacher = at_least_float32(student)[:, :-1], at_least_float32(teacher)[:, :-1]
    known = teacher.log_softmax(-1)
    hard = -known.gather(-1, ids[:, 1:, None]).squeeze(-1) / temperature
    each = -(known.exp() * student.log_softmax(-1)).sum(-1)
    if mask is None:
        return (hard.softmax(-1) * each).sum(-1).mean()
    kept = mask[:, 1:] != 0
    scale = hard.masked_fill(~kept, _LOWEST).softmax(-1) * kept
    return (scale * each).sum(-1).mean()


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


def token_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error of each token in units of the teacher's variance there; a mean over tokens.

    ``mean_f (s - t)² / max(var_f t, 1e-5)``, over the features of a token. So a token of large values (the first of
    many decoders) counts for no more than another, and layers of other sizes count alike.

    Args:
        student: shape ``(..., features)``; if masked, the mask's dimensions come first.
        teacher: the same shape.
        mask: None, or ``(batch, tokens)``, or ``(batch * tokens,)``; values without features are not masked.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    variance = teacher.var(-1, correction=0).clamp(min=_SMALLEST_VARIANCE)
    return _over_tokens((student - teacher).square().mean(-1) / variance, mask)


def layer_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error over the teacher's own variance: ``mean (s - t)² / max(var t, 1e-5)`` over all entries.

    Arguments as :func:`mean_squared_error`; masked, both are over the entries of the tokens that the mask keeps. A
    batch's variance is its own, so that accumulated micro-batches are each divided by theirs.
    """
    error = mean_squared_error(student, teacher, mask)
    teacher = at_least_float32(teacher)
    if mask is None or teacher.dim() <= mask.dim():
        variance = teacher.var(correction=0)
    else:
        tokens = teacher.flatten(mask.dim())
        mean = _mean(tokens.mean(-1), mask)
        variance = _mean((tokens - mean).square().mean(-1), mask)
    return error / variance.clamp(min=_SMALLEST_VARIANCE)


def cosine_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 less the cosine between the two vectors of a row: ``1 - s·t / (‖s‖ ‖t‖)``; a mean over rows.

    Args:
        student: shape ``(..., features)``.
        teacher: the same shape.
        mask: None, or ``(batch, tokens)`` with nonzero at the tokens that count (for a vector a token).
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    return _over_tokens(1 - torch.nn.functional.cosine_similarity(student, teacher, -1), mask)


def scores_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of attention scores, with positions at or below -100 zeroed on each side.

    Args:
        student: scores before softmax, mask added, shape ``(batch, heads, queries, keys)``.
        teacher: the same shape.
        mask: None, or ``(batch, queries)`` with nonzero at the query tokens that count.
    """
    # threshold: the value where it is above -100, else 0
    student, teacher = (
        torch.nn.functional.threshold(at_least_float32(value), _HIDDEN, 0.0) for value in (student, teacher)
    )
    if mask is None or student.dim() != 4:
        return torch.nn.functional.mse_loss(student, teacher)
    each = torch.nn.functional.mse_loss(student, teacher, reduction="none")
    return _mean(each.mean((1, 3)), mask)


def relative_scores_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error of attention scores in units of the variance of the teacher's in the same row of the batch.

    Of each row ``(s - t)² / max(var t, 1e-5)``, the variance over its positions above -100; a mean over all entries,
    positions at or below -100 zeroed on each side. Arguments as :func:`scores_error`.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    seen = teacher > _HIDDEN
    dims = list(range(1, teacher.dim()))
    known = teacher.masked_fill(~seen, 0.0)
    count = seen.sum(dims, keepdim=True).clamp(min=1)
    mean = known.sum(dims, keepdim=True) / count
    variance = ((known - mean).square() * seen).sum(dims, keepdim=True) / count
    student = torch.nn.functional.threshold(student, _HIDDEN, 0.0)
    each = (student - known).square() / variance.clamp(min=_SMALLEST_VARIANCE)
    return each.mean() if mask is None or each.dim() != 4 else _mean(each.mean((1, 3)), mask)


def map_divergence(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Divergence of the student's attention map from the teacher's, a mean over maps and queries.

    ``Σ_k softmax(t)_k (log softmax(t)_k - log softmax(s)_k)``. Source: Kim et al., "Understanding and Improving
    Knowledge Distillation for Quantization-Aware Training of Large Transformer Encoders", EMNLP 2022, section 4.

    Args:
        student: scores before softmax, mask added, shape ``(..., queries, keys)``.
        teacher: the same shape.
        mask: None, or ``(batch, queries)`` with nonzero at the query tokens that count, of ``(batch, heads, queries,
            keys)``.
    """
    each = _divergence(at_least_float32(student), at_least_float32(teacher))
    return each.mean() if mask is None or student.dim() != 4 else _mean(each.mean(1), mask)


def relation_divergence(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """Divergence of how alike the tokens are to each other: of ``softmax(x xᵀ / √d)`` for queries, keys or values x.

    A mean over heads and tokens of ``Σ_k p_k (log p_k - log q_k)``, p the teacher's. Source: MiniLMv2 (Wang et al.,
    arXiv 2012.15828), section 3.1, with the model's own heads.

    Args:
        student: shape ``(..., tokens, features)``.
        teacher: the same shape.
        mask: None, or ``(batch, tokens)`` with nonzero at the tokens that count, of values of four dimensions.
        transposed: the shape is ``(..., features, tokens)``.
    """
    relations = []
    for value in (at_least_float32(student), at_least_float32(teacher)):
        value = value.transpose(-1, -2) if transposed else value
        alike = value @ value.transpose(-1, -2) / value.shape[-1] ** 0.5
        if mask is not None and value.dim() == 4:
            alike = alike.masked_fill((mask == 0)[:, None, None], _LOWEST)
        relations.append(alike)
    each = _divergence(*relations)
    return each.mean() if mask is None or each.dim() != 3 else _mean(each.mean(1), mask)


# What compares a student's value with the teacher's.
COMPARE = (
    soft_cross_entropy,
    kl_divergence,
    token_scaled_cross_entropy,
    mean_squared_error,
    token_error,
    layer_error,
    cosine_distance,
    scores_error,
    relative_scores_error,
    map_divergence,
    relation_divergence,
)
OF_CLASSES = (soft_cross_entropy, kl_divergence)
OF_HEADS = (scores_error, relative_scores_error, map_divergence, relation_divergence)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence over the last dimension of the distributions that two tensors are the logits of."""
    known, found = (value.clamp(min=_LOWEST).log_softmax(-1) for value in (teacher, student))
    return (known.exp() * (known - found)).sum(-1)


def _mean(per_token: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return per_token.mean()
    kept = (mask != 0).to(per_token.dtype)
    return (per_token * kept).sum() / kept.sum().clamp(min=1)


def _over_tokens(each: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of what each vector gives, over those of the tokens that the mask keeps."""
    if mask is None or each.dim() < mask.dim():
        return each.mean()
    return _mean(each if each.dim() == mask.dim() else each.flatten(mask.dim()).mean(-1), mask)


def averaged(loss: Callable[..., Tensor], student: Tensor) -> Sequence[int | torch.SymInt]:
    """Return the sizes whose product counts what one of these losses, without a mask, is a mean over."""
    if loss is token_scaled_cross_entropy:
        return student.shape[:1]
    if loss is map_divergence:
        return student.shape[:-1]
    return student.shape


def masks_tokens(loss: Callable[..., Tensor], student: Tensor, mask: Tensor | None) -> bool:
    """Whether one of these losses is a mean over the tokens that ``mask`` keeps, of a student's value as shaped.

    Else it is a mean over all entries.
    """
    if mask is None or loss is token_scaled_cross_entropy:
        return False
    if loss in OF_HEADS:
        return student.dim() == 4
    if loss in OF_CLASSES and student.shape[-1] != 1:
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


def learned(value: Tensor, log_variance: Tensor, share: float = 1.0) -> Tensor:
    """Return ``exp(-s) · L + s``: a loss that is weighed by what is learned of how uncertain it is.

    With respect to s it is least where ``exp(s) = L``. Source: Kendall et al., "Multi-Task Learning Using Uncertainty
    to Weigh Losses", CVPR 2018 (arXiv 1705.07115), section 3.2, with ``s = log σ²``, and without its halves, which
    scale all losses alike.

    Args:
        value: L, a scalar.
        log_variance: s, a scalar.
        share: of s that is added: a micro-batch's of its batch.
    """
    return torch.exp(-log_variance) * value + share * log_variance


def weighted(values: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """Add scalars times their weights, in order."""
    return total([value * weight for value, weight in zip(values, weights, strict=True)])
