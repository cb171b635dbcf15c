"""A learned step of activations: numbers and gradients against the paper's equations in NumPy, and its start."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from grids import LEARNED
from torch import Tensor

from ti_fx.numerics.encodings import get_encoding
from ti_fx.numerics.quantiser import Quantiser


def quantiser_of(name: str) -> Quantiser:
    quantiser = get_encoding(name).quantiser
    assert quantiser is not None
    return quantiser


def ends(name: str) -> tuple[int, int]:
    bits = int(name.partition("-")[0].removeprefix("int"))
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def values() -> Tensor:
    """Values within the range and beyond both of its ends, with a step of 0.1."""
    value = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value[0, 0, :4] = torch.tensor([-1e3, 1e3, 0.0, -0.05], dtype=torch.float64)
    return value


def step(size: float = 0.1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(size, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("name", LEARNED)
def test_numbers_and_gradients_are_the_papers(name: str) -> None:
    """Equations 1 to 3, value by value, and the gradient scale 1 / sqrt(N p) with the N values of a row."""
    least, most = ends(name)
    value, own = values().requires_grad_(), step()
    gradient = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = quantiser_of(name).function(value, own)
    of_value, of_step = torch.autograd.grad(found, (value, own), gradient)
    place = value.detach().numpy() / 0.1
    numpy.testing.assert_array_equal(
        found.detach().numpy(), numpy.clip(numpy.rint(place), least, most) * numpy.float64(0.1)
    )
    inside = (place > least) & (place < most)
    assert inside.any()
    assert not inside.all()
    numpy.testing.assert_array_equal(of_value.numpy(), gradient.numpy() * inside)
    slopes = numpy.where(
        inside, numpy.rint(place) - place, numpy.where(place <= least, float(least), float(most))
    )
    expected = (gradient.numpy() * slopes).sum() / math.sqrt(5 * 7 * most)
    assert of_step.shape == ()
    numpy.testing.assert_allclose(of_step.item(), expected, rtol=1e-12)


@pytest.mark.parametrize("name", LEARNED)
def test_a_step_starts_as_published_and_counts_as_something(name: str) -> None:
    quantiser, (_, most) = quantiser_of(name), ends(name)
    assert quantiser.start is not None
    value = values().float()
    torch.testing.assert_close(quantiser.start(value), 2 * value.abs().mean() / math.sqrt(most))
    for nothing in (torch.zeros(3, 4), torch.zeros(0, 4)):
        assert quantiser.start(nothing).item() == 1
    for size in (0.0, -1.0):
        own = step(size, torch.float32)
        found = quantiser.function(torch.ones(2, 3, requires_grad=True), own)
        torch.testing.assert_close(found, torch.full((2, 3), most * 1e-5))
        found.sum().backward()  # type: ignore[no-untyped-call]
        assert own.grad is not None
        assert own.grad.item() > 0  # beyond the range, which may grow again


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_stay(name: str, dtype: torch.dtype) -> None:
    function, own = quantiser_of(name).function, step(dtype=torch.float32)
    for shape in ((), (0,), (2, 0, 4), (3, 7)):
        value = torch.linspace(-2, 2, math.prod(shape)).view(shape).to(dtype).requires_grad_()
        found = function(value, own)
        assert (found.shape, found.dtype) == (shape, dtype)
        found.sum().backward()  # type: ignore[no-untyped-call]
        assert value.grad is not None
        assert value.grad.dtype == dtype
    wide = torch.linspace(-2, 2, 21)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(wide, own), function(wide, own))
    assert torch.equal(function(wide.bfloat16(), own), function(wide.bfloat16().float(), own).bfloat16())


@pytest.mark.parametrize("name", LEARNED)
def test_a_row_is_independent_of_its_batch_and_moves_by_half_a_step_within(name: str) -> None:
    quantiser, value, own = quantiser_of(name), values(), step()
    found = quantiser.function(value, own)
    assert quantiser.batch_invariant
    assert torch.equal(quantiser.function(value[1:2], own)[0], found[1])
    least, most = ends(name)
    inside = (value / 0.1 > least) & (value / 0.1 < most)
    assert bool(((found - value).abs()[inside] <= quantiser.step(found, own) / 2 * (1 + 1e-9)).all())


@pytest.mark.seconds
def test_compiled_equals_eager() -> None:
    function = quantiser_of("int4-learned").function
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend="aot_eager")
    for shape in ((4, 6), (5, 7)):
        pairs = [
            (
                values()[0, 0, :1].float() + torch.randn(shape, generator=torch.Generator().manual_seed(0))
            ).clone()
            for _ in range(2)
        ]
        steps = [step(0.3, torch.float32) for _ in range(2)]
        results = [
            one(value.requires_grad_(), own)
            for one, value, own in zip((function, compiled), pairs, steps, strict=True)
        ]
        assert torch.equal(*results)
        gradients = [
            torch.autograd.grad(result.square().sum(), (value, own))
            for result, value, own in zip(results, pairs, steps, strict=True)
        ]
        assert torch.equal(gradients[0][0], gradients[1][0])
        torch.testing.assert_close(gradients[0][1], gradients[1][1])
    torch._dynamo.reset()
