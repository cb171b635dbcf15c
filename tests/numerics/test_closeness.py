"""How far two tensors are: equal NaNs and infinities are nothing, and a NaN in one alone lets no tolerance pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from ti_fx.numerics import closeness
from ti_fx.numerics.closeness import by_vector, relative

INFINITY, NAN = float("inf"), float("nan")
NUMBERS = st.floats(-1e6, 1e6, width=32)
ANY = NUMBERS | st.sampled_from([NAN, INFINITY, -INFINITY])


@st.composite
def pairs(draw: Any, values: st.SearchStrategy[float] = ANY) -> tuple[Tensor, Tensor]:
    rows, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    either = st.lists(values, min_size=rows * size, max_size=rows * size)
    found, expected = (torch.tensor(draw(either)).view(rows, size) for _ in range(2))
    return found, expected


@given(pairs())
def test_a_gap_is_a_distance(pair: tuple[Tensor, Tensor]) -> None:
    found, expected = pair
    gap = closeness.gap(found, expected)
    assert gap.dtype == torch.float64
    assert bool((gap >= 0).all())  # and so no NaN
    assert torch.equal(gap, closeness.gap(expected, found))
    assert not closeness.gap(found, found).any()
    apart = found.isfinite() != expected.isfinite()
    assert bool(gap[apart].isinf().all())
    finite = found.isfinite() & expected.isfinite()
    difference = found[finite].numpy().astype(np.float64) - expected[finite].numpy()
    assert np.array_equal(gap[finite].numpy(), np.abs(difference))


@given(pairs())
def test_same_is_no_gap(pair: tuple[Tensor, Tensor]) -> None:
    found, expected = pair
    equal = np.array_equal(found.numpy(), expected.numpy(), equal_nan=True)
    assert closeness.same(found, expected) == equal
    assert closeness.same(found, found.clone())
    assert not closeness.same(found, torch.cat([found, found]))


@given(pairs(NUMBERS))
def test_of_finite_numbers_they_are_numpys(pair: tuple[Tensor, Tensor]) -> None:
    found, expected = pair
    left, right = (value.numpy().astype(np.float64) for value in pair)
    assume(np.abs(right).max() > 1e-30)  # beside less, see below
    assert closeness.relative(found, expected) == pytest.approx(
        np.linalg.norm(left - right) / np.linalg.norm(right), rel=1e-9
    )
    assert closeness.largest(found, expected) == pytest.approx(
        np.abs(left - right).max() / np.abs(right).max(), rel=1e-9
    )
    by_vector = closeness.by_vector(found, expected)
    for row, distance in enumerate(by_vector):
        if np.abs(right[row]).max() > 1e-30:
            wanted = np.linalg.norm(left[row] - right[row]) / np.linalg.norm(right[row])
            assert float(distance) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("wrong", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("turned", [False, True])
def test_what_is_no_number_in_one_alone_passes_no_tolerance(wrong: float, turned: bool) -> None:
    """Wherever it stands among others: Python's max forgets a NaN that comes second."""
    for place in (0, 50, 999):
        one, other = torch.ones(1000, 1), torch.ones(1000, 1)
        one[place] = wrong
        pair = (other, one) if turned else (one, other)
        named = [{"first": torch.ones(2), "second": value} for value in pair]
        assert closeness.relative(*pair) == INFINITY
        assert closeness.largest(*pair) == INFINITY
        assert closeness.p99(closeness.gap(*pair)) == INFINITY
        assert closeness.distance(*named) == INFINITY
        assert closeness.median_distance(*named) == INFINITY


def test_a_distance_beside_zeros_is_large_and_finite() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    for measure in (closeness.relative, closeness.largest):
        assert 1e30 < measure(ones, zeros) < INFINITY
        assert measure(zeros, zeros) == 0


def test_nothing_is_no_distance_apart() -> None:
    none = torch.ones(0, 4)
    assert closeness.relative(none, none) == closeness.largest(none, none) == 0
    assert closeness.p99(closeness.gap(none, none)) == 0
    assert closeness.same(none, none)
    assert not closeness.same(none, torch.ones(4, 0))
    assert closeness.distance({}, {}) == closeness.median_distance({}, {}) == 0


def test_structures_of_other_names_or_shapes_are_infinitely_far() -> None:
    one = {"logits": torch.ones(2, 3)}
    assert closeness.distance(one, {"hidden": torch.ones(2, 3)}) == INFINITY
    assert closeness.distance(one, {"logits": torch.ones(3, 2)}) == INFINITY


@given(st.integers(1, 300), st.randoms(use_true_random=False))
def test_p99_leaves_the_largest_hundredth_out(count: int, random: Any) -> None:
    values = list(range(count))
    random.shuffle(values)
    found = closeness.p99(torch.tensor(values, dtype=torch.float64))
    assert sum(value > found for value in values) <= 0.01 * count + 0.5
    assert found in values


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16])
def test_any_type_has_a_gap(dtype: torch.dtype) -> None:
    found, expected = torch.tensor([1, 0, 1]).to(dtype), torch.tensor([1, 1, 0]).to(dtype)
    assert closeness.gap(found, expected).tolist() == [0, 1, 1]


def test_rows_without_numbers_in_both_say_nothing() -> None:
    expected = torch.tensor([[3.0, 4.0], [float("nan"), float("nan")], [1.0, float("inf")]])
    found = torch.tensor([[3.0, 4.5], [float("nan"), float("nan")], [1.0, float("inf")]])
    torch.testing.assert_close(by_vector(found, expected), torch.tensor([0.1, 0.0], dtype=torch.float64))
    assert 0.09 < relative(found, expected) < 0.1


def test_a_row_without_numbers_in_one_of_them_is_infinitely_far() -> None:
    numbers, none = torch.ones(1, 2), torch.full((1, 2), float("nan"))
    assert by_vector(none, numbers).isinf().all()
    assert by_vector(numbers, none).isinf().all()
