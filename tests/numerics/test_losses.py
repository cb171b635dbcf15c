"""Distillation losses against their formulas in NumPy, float64, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ti_fx.numerics import losses

Array = NDArray[np.float64]
BATCH, TOKENS, HEADS, FEATURES = 3, 5, 2, 4
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])


def drawn(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind()
    return 3 * student, 3 * teacher


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    result: Array = e / e.sum(-1, keepdims=True)
    return result


def kl(student: Array, teacher: Array) -> Array:
    p, q = softmax(teacher), softmax(student)
    terms = np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0.0)
    result: Array = terms.sum(-1)
    return result


def mean_of_tokens(each: Array, mask: Tensor | None) -> float:
    """``each`` is (batch, tokens, ...)."""
    if mask is None:
        return float(each.mean())
    kept = [each[b, n].mean() for b in range(BATCH) for n in range(TOKENS) if mask[b, n]]
    return float(sum(kept) / max(len(kept), 1))


def by_token(student: Array, teacher: Array, mask: Tensor | None) -> float:
    return mean_of_tokens(((student - teacher) ** 2).mean(-1) / teacher.var(-1), mask)


def by_layer(student: Array, teacher: Array, mask: Tensor | None) -> float:
    kept = np.ones((BATCH, TOKENS), bool) if mask is None else mask.numpy().astype(bool)
    return float(((student - teacher)[kept] ** 2).mean() / teacher[kept].var())


def by_cosine(student: Array, teacher: Array, mask: Tensor | None) -> float:
    product = (student * teacher).sum(-1)
    norms = np.sqrt((student**2).sum(-1) * (teacher**2).sum(-1))
    return mean_of_tokens(1 - product / norms, mask)


def by_class(student: Array, teacher: Array, mask: Tensor | None) -> float:
    return mean_of_tokens(kl(student / 2.5, teacher / 2.5) * 2.5**2, mask)


def soft(student: Array, teacher: Array, mask: Tensor | None) -> float:
    p = softmax(teacher / 2.5)
    each = -(p * np.log(softmax(student / 2.5))).sum(-1) * 2.5**2
    return mean_of_tokens(each, mask)


def with_temperature(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda student, teacher, mask: loss(student, teacher, mask, 2.5)


VECTORS: dict[str, tuple[Callable[..., Tensor], Callable[..., float]]] = {
    "token": (losses.token_error, by_token),
    "layer": (losses.layer_error, by_layer),
    "cosine": (losses.cosine_distance, by_cosine),
    "kl": (with_temperature(losses.kl_divergence), by_class),
    "cross-entropy": (with_temperature(losses.soft_cross_entropy), soft),
}


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("name", VECTORS)
def test_a_loss_of_a_vector_a_token_is_its_formula(name: str, mask: Tensor | None) -> None:
    student, teacher = drawn(BATCH, TOKENS, FEATURES)
    loss, formula = VECTORS[name]
    assert float(loss(student, teacher, mask)) == pytest.approx(
        formula(student.numpy(), teacher.numpy(), mask), rel=1e-10
    )
    if name not in ("cross-entropy",):
        assert float(loss(teacher, teacher, mask)) == pytest.approx(0, abs=1e-12)


def test_tokens_side_by_side_are_masked_too() -> None:
    student, teacher = drawn(BATCH, TOKENS, FEATURES)
    for loss in (losses.token_error, losses.layer_error):
        flat = loss(student.flatten(0, 1), teacher.flatten(0, 1), MASK.flatten())
        torch.testing.assert_close(flat, loss(student, teacher, MASK))


def maps(student: Array, teacher: Array, mask: Tensor | None) -> float:
    return mean_of_tokens(np.moveaxis(kl(student, teacher), 1, 2), mask)


def relative_scores(student: Array, teacher: Array, mask: Tensor | None) -> float:
    each = np.empty_like(student)
    for b in range(BATCH):
        seen = teacher[b] > -100
        variance = teacher[b][seen].var()
        mine, theirs = (np.where(value[b] > -100, value[b], 0.0) for value in (student, teacher))
        each[b] = (mine - theirs) ** 2 / variance
    return mean_of_tokens(np.moveaxis(each, 1, 2).mean(-1), mask)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize(
    ("loss", "formula"),
    [(losses.map_divergence, maps), (losses.relative_scores_error, relative_scores)],
    ids=["maps", "scores"],
)
@pytest.mark.parametrize("hidden", [float("-inf"), -10_000.0, torch.finfo(torch.float32).min])
def test_a_loss_of_scores_is_its_formula(loss: Any, formula: Any, mask: Tensor | None, hidden: float) -> None:
    student, teacher = drawn(BATCH, HEADS, TOKENS, TOKENS)
    causal = torch.ones(TOKENS, TOKENS).tril() == 0
    student, teacher = (value.masked_fill(causal, hidden) for value in (student, teacher))
    expected = formula(student.numpy(), teacher.numpy(), mask)
    assert float(loss(student, teacher, mask)) == pytest.approx(expected, rel=1e-10)
    assert float(loss(teacher, teacher, mask)) == pytest.approx(0, abs=1e-12)


def test_a_row_that_is_hidden_whole_has_no_divergence() -> None:
    student, teacher = (torch.full((1, 1, 2, 3), float("-inf"), requires_grad=on) for on in (True, False))
    found = losses.map_divergence(student, teacher)
    assert found == 0
    found.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("transposed", [False, True])
def test_relations_are_their_formula(mask: Tensor | None, transposed: bool) -> None:
    student, teacher = drawn(BATCH, HEADS, TOKENS, FEATURES)
    kept = np.ones((BATCH, TOKENS), bool) if mask is None else mask.numpy().astype(bool)
    found = []
    for b in range(BATCH):
        if not kept[b].any():
            continue
        mine, theirs = (value[b].numpy()[:, kept[b]] for value in (student, teacher))
        relations = [x @ np.swapaxes(x, -1, -2) / FEATURES**0.5 for x in (mine, theirs)]
        found += list(kl(*relations).mean(0))
    one, other = (value.mT if transposed else value for value in (student, teacher))
    actual = losses.relation_divergence(one, other, mask, transposed)
    assert float(actual) == pytest.approx(sum(found) / len(found), rel=1e-10)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_token_scaled_logits_are_their_formula(mask: Tensor | None) -> None:
    student, teacher = drawn(BATCH, TOKENS, 7)
    ids = torch.randint(7, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    rows = []
    for b in range(BATCH):
        follows = [n for n in range(TOKENS - 1) if mask is None or mask[b, n + 1]]
        known = np.log(softmax(teacher[b].numpy()))
        own = np.log(softmax(student[b].numpy()))
        hard = np.array([-known[n, ids[b, n + 1]] / 10.0 for n in follows])
        scale = softmax(hard) if follows else hard
        each = np.array([-(np.exp(known[n]) * own[n]).sum() for n in follows])
        rows.append(float((scale * each).sum()))
    actual = losses.token_scaled_cross_entropy(student, teacher, mask, ids)
    assert float(actual) == pytest.approx(np.mean(rows), rel=1e-10)


@pytest.mark.parametrize("loss", losses.COMPARE, ids=lambda loss: loss.__name__)
def test_half_precision_is_computed_in_float32(loss: Callable[..., Tensor]) -> None:
    shape = (2, 3, 4, 4) if loss in losses.OF_HEADS else (2, 3, 4)
    student, teacher = (value.to(torch.bfloat16) for value in drawn(*shape))
    further = (torch.zeros(2, 3, dtype=torch.long),) if loss is losses.token_scaled_cross_entropy else ()
    found = loss(student, teacher, None, *further)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(student.float(), teacher.float(), None, *further))
