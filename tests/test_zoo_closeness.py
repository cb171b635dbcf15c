"""Outputs are compared by vectors, and a row that is all padding may be no number in both."""

from __future__ import annotations

import torch

from ti_fx.zoo.closeness import by_vector, relative

NAN, INFINITY = float("nan"), float("inf")


def test_rows_without_numbers_in_both_say_nothing() -> None:
    expected = torch.tensor([[3.0, 4.0], [NAN, NAN], [1.0, INFINITY]])
    found = torch.tensor([[3.0, 4.5], [NAN, NAN], [1.0, INFINITY]])
    torch.testing.assert_close(by_vector(found, expected), torch.tensor([0.1, 0.0], dtype=torch.float64))
    assert 0.09 < relative(found, expected) < 0.1


def test_a_row_without_numbers_in_one_of_them_is_no_number() -> None:
    numbers, none = torch.ones(1, 2), torch.full((1, 2), NAN)
    assert by_vector(none, numbers).isnan().all()
    assert by_vector(numbers, none).isnan().all()
