"""Activations of 8, 4 and 2 bits, symmetric and asymmetric, by tensor, token and block, against NumPy."""

from __future__ import annotations

import numpy
import pytest
import torch
from grids import FEW_BITS
from numpy.typing import NDArray
from torch import Tensor

from ti_fx.numerics.encodings import get_encoding
from ti_fx.numerics.quantiser import Quantiser

Array = NDArray[numpy.float64]
BLOCK = 32


def quantiser_of(name: str) -> Quantiser:
    quantiser = get_encoding(name).quantiser
    assert quantiser is not None
    return quantiser


def bits_of(name: str) -> int:
    return int(name.partition("-")[0].removeprefix("int"))


def is_asymmetric(name: str) -> bool:
    """A range over the whole tensor is asymmetric unless its name says otherwise, every other one symmetric."""
    return name.endswith(("asymmetric", "-tensor"))


def step_of(values: Array, name: str) -> float:
    """Return the step of one range: of one around zero, or of one that holds zero; of zeros 1."""
    if is_asymmetric(name):
        return float(max(values.max(), 0.0) - min(values.min(), 0.0)) / (2 ** bits_of(name) - 1) or 1.0
    return float(numpy.abs(values).max()) / (2 ** (bits_of(name) - 1) - 1) or 1.0


def rounded(values: Array, name: str) -> Array:
    """Return the values of one range, rounded."""
    step, most = step_of(values, name), 2 ** (bits_of(name) - 1) - 1
    if is_asymmetric(name):
        zero, most = numpy.rint(-min(values.min(), 0.0) / step), 2 ** bits_of(name) - 1
        asymmetric: Array = (numpy.clip(numpy.rint(values / step) + zero, 0, most) - zero) * step
        return asymmetric
    symmetric: Array = numpy.clip(numpy.rint(values / step), -most, most) * step
    return symmetric


def ranges(values: Array, name: str) -> list[list[Array]]:
    """Return the ranges of each row, one of the whole tensor alone."""
    if "tensor" in name:
        return [[values]]
    size = BLOCK if "block" in name else values.shape[-1]
    rows = values.reshape(-1, values.shape[-1])
    return [[row[start : start + size] for start in range(0, len(row), size)] for row in rows]


def expected(values: Array, name: str) -> Array:
    if "tensor" in name:
        return rounded(values, name)
    rows = [numpy.concatenate([rounded(part, name) for part in row]) for row in ranges(values, name)]
    return numpy.stack(rows).reshape(values.shape)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


VALUES = {
    "normal": normal(3, 4, 64),
    "an odd length": normal(3, 4, 37),
    "shorter than a block": normal(2, 7),
    "one dimension": normal(40),
    "one value a token": normal(5, 1),
    "skewed": torch.nn.functional.gelu(3 * normal(3, 40)),
    "positive": normal(3, 40).abs() + 1,
    "negative": -normal(3, 40).abs() - 1,
    "zeros": torch.zeros(2, 40, dtype=torch.float64),
    "a row of zeros": torch.cat([normal(2, 40), torch.zeros(1, 40, dtype=torch.float64)]),
    "constant": torch.full((2, 40), 0.75, dtype=torch.float64),
    "negative and constant": torch.full((2, 40), -2.5, dtype=torch.float64),
    "ends between two codes": torch.tensor([[7.5, -7.5, 1.5, -1.5, 0.5, 127.5, -127.5]], dtype=torch.float64),
    "an outlier": torch.cat([normal(3, 39), torch.full((3, 1), 1e4, dtype=torch.float64)], dim=1),
}


@pytest.mark.parametrize("name", FEW_BITS)
def test_the_numbers_are_the_formula(name: str) -> None:
    for kind, value in VALUES.items():
        before = value.clone()
        found = quantiser_of(name).function(value)
        numpy.testing.assert_array_equal(found.numpy(), expected(value.numpy(), name), err_msg=kind)
        assert torch.equal(value, before)


@pytest.mark.parametrize("name", FEW_BITS)
def test_a_range_has_no_more_values_than_its_bits(name: str) -> None:
    found = quantiser_of(name).function(VALUES["ends between two codes"])
    most = 2 ** bits_of(name) - (0 if is_asymmetric(name) else 1)
    assert len(set(found.flatten().tolist())) <= most
    assert bool((quantiser_of(name).function(torch.zeros(3, 5)) == 0).all())


@pytest.mark.parametrize("name", FEW_BITS)
def test_the_bound_of_a_step_is_no_less_than_any_ranges(name: str) -> None:
    """The bound knows what was rounded alone, which may span less than the range."""
    quantiser = quantiser_of(name)
    for kind, value in VALUES.items():
        bound = quantiser.step(quantiser.function(value)).reshape(-1)
        for row, most in zip(ranges(value.numpy(), name), bound.tolist(), strict=True):
            steps = [step_of(part, name) for part in row if part.any()]
            assert all(step <= most * (1 + 1e-9) <= 3 * max(steps) for step in steps), kind


@pytest.mark.parametrize("name", FEW_BITS)
def test_nothing_and_a_batch_of_nothing_stay_what_they_are(name: str) -> None:
    for shape in ((0,), (0, 8), (3, 0), (2, 0, 4)):
        value = torch.zeros(shape, requires_grad=True)
        found = quantiser_of(name).function(value)
        assert found.shape == shape
        found.sum().backward()  # type: ignore[no-untyped-call]
        assert value.grad is not None


@pytest.mark.parametrize("name", FEW_BITS)
def test_the_gradient_passes_everywhere(name: str) -> None:
    """A range is of the value itself, so nothing lies beyond it by more than half a step, and nothing is cut off."""
    value = VALUES["an outlier"].clone().requires_grad_()
    gradient = normal(*value.shape)
    (found,) = torch.autograd.grad(quantiser_of(name).function(value), value, gradient)
    assert torch.equal(found, gradient)


@pytest.mark.parametrize("name", [name for name in FEW_BITS if "tensor" not in name])
def test_rows_come_out_the_same_in_any_batch(name: str) -> None:
    quantiser, value = quantiser_of(name), VALUES["normal"].float()
    found, order = quantiser.function(value), torch.tensor([2, 0, 1])
    assert quantiser.batch_invariant
    assert torch.equal(quantiser.function(value[order]), found[order])
    more = torch.cat([value, 100 * value])
    assert torch.equal(quantiser.function(more)[:3], found)


def test_fewer_bits_lose_more() -> None:
    value = normal(8, 64)
    for ranges in ("token-asymmetric", "block-32-asymmetric"):
        errors = [
            float((quantiser_of(f"int{bits}-{ranges}").function(value) - value).norm() / value.norm())
            for bits in (8, 4, 2)
        ]
        assert errors == sorted(errors)
        assert errors[0] < 0.01 < errors[1] < 0.2 < errors[2]
