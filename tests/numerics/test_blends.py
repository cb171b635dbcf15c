"""Blends at their ends are the student's or the teacher's bits, whatever these are; between, they are the formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ti_fx.numerics import blend, detach_by, route

ODD = [math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-40, 3.4e38, -1.5]


def bits(value: Tensor) -> list[int]:
    kind = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}[value.dtype]
    found: list[int] = value.detach().contiguous().view(kind).flatten().tolist()
    return found


def grid(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every odd value of the student beside every one of the teacher."""
    odd = torch.tensor(ODD, dtype=dtype)
    student, teacher = torch.meshgrid(odd, odd.flip(0), indexing="ij")
    return student.clone().requires_grad_(), teacher.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_ends_are_exact(share: float, dtype: torch.dtype) -> None:
    student, teacher = grid(dtype)
    result = blend(student, teacher, torch.tensor(share))
    assert result.dtype == dtype
    assert bits(result) == bits(teacher if share else student)
    result.backward(teacher)  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert bits(student.grad) == bits(torch.zeros_like(teacher) if share else teacher)


def test_between_it_is_the_formula() -> None:
    torch.manual_seed(0)
    student, teacher, share = (torch.randn(4, 5, dtype=torch.float64) for _ in range(3))
    share = share.sigmoid()[:, :1]
    assert torch.autograd.gradcheck(
        lambda value: blend(value, teacher, share), student.clone().requires_grad_()
    )
    torch.testing.assert_close(
        blend(student, teacher, share), share * teacher + (1 - share) * student, rtol=1e-14, atol=1e-14
    )


def test_a_mask_chooses_row_by_row() -> None:
    student, teacher = grid(torch.float32)
    mask = torch.tensor([1.0, 0.0] * 4)[:, None]
    result = blend(student, teacher, mask)
    assert bits(result) == bits(torch.where(mask.bool(), teacher, student))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_partial_detach_stops_its_share(share: float) -> None:
    value = torch.tensor(ODD, requires_grad=True)
    result = detach_by(value, torch.tensor(share))
    assert bits(result) == bits(value)
    gradient = torch.tensor([1.0, -2.0, math.inf, math.nan, -0.0, 3.0, 4.0, 5.0])
    result.backward(gradient)  # type: ignore[no-untyped-call]
    assert value.grad is not None
    expected = torch.zeros(8) if share == 1 else gradient * (1 - share)
    assert bits(value.grad) == bits(expected)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_gradient_is_routed_by_its_share(share: float) -> None:
    value, other = torch.tensor(ODD, requires_grad=True), torch.tensor(ODD, requires_grad=True)
    result = route(value, other, torch.tensor(share))
    assert bits(result) == bits(value)
    gradient = torch.tensor([1.0, -2.0, math.inf, math.nan, 0.5, 3.0, 4.0, 5.0])
    result.backward(gradient)  # type: ignore[no-untyped-call]
    assert value.grad is not None
    assert other.grad is not None
    assert bits(value.grad) == bits(torch.zeros(8) if share == 1 else gradient * (1 - share))
    assert bits(other.grad) == bits(torch.zeros(8) if share == 0 else gradient * share)
