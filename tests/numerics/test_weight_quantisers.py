"""Each method of making weights ternary or binary against a statement of it in NumPy, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ti_fx import numerics
from ti_fx.errors import InputError
from ti_fx.numerics.codes import spread
from ti_fx.numerics.weight_codes import GRANULARITIES, Granularity, group_of, scale_shape
from ti_fx.numerics.weight_quantisers import BY_FUNCTION, METHODS, get_method

Array = NDArray[Any]
FIXED = [method for method in METHODS.values() if not method.learned]
STEPS = [get_method(name) for name in ("lsq", "seq")]
CLIP = 1.5
ROWS, SIZE = 6, 100  # of which no group is a divisor


def numpy_twn(w: Array) -> Array:
    """arXiv 1605.04711, equations 5 and 6."""
    beyond = numpy.abs(w) > 0.7 * numpy.abs(w).mean()
    result: Array = numpy.sign(w) * beyond * (numpy.abs(w)[beyond].mean() if beyond.any() else 0.0)
    return result


def numpy_absmean(w: Array) -> Array:
    """arXiv 2402.17764, equations 1 to 3; its epsilon only keeps zeros from being divided by zero."""
    gamma = numpy.abs(w).mean()
    result: Array = numpy.clip(numpy.round(w / (gamma or 1.0)), -1, 1) * gamma
    return result


def numpy_binary(w: Array) -> Array:
    """arXiv 1603.05279, equation 4."""
    result: Array = numpy.where(w >= 0, 1.0, -1.0) * numpy.abs(w).mean()
    return result


def numpy_binary_centred(w: Array) -> Array:
    """The sign of what is left of the weight without its mean, times the mean magnitude."""
    result: Array = numpy.where(w >= w.mean(), 1.0, -1.0) * numpy.abs(w).mean()
    return result


def numpy_sherry(w: Array) -> Array:
    """arXiv 2601.07892: three of four are signs, and the scale is the one with the least squared error."""
    codes = numpy.where(w < 0, -1.0, 1.0).reshape(-1, 4)
    for block, four in zip(codes, numpy.abs(w).reshape(-1, 4), strict=True):
        block[four.argmin()] = 0
    flat = codes.reshape(-1)
    result: Array = flat * (flat @ w) / (flat @ flat)
    return result


STATEMENTS: dict[str, Callable[[Array], Array]] = {
    "twn": numpy_twn,
    "absmean": numpy_absmean,
    "binary": numpy_binary,
    "binary-centred": numpy_binary_centred,
    "sherry": numpy_sherry,
}


def numpy_lsq(w: Array, step: float) -> tuple[Array, Array, Array]:
    """arXiv 1902.08153, equations 1 to 3 and 5: value, its derivative by the weight, and by the step."""
    over = w / step
    inside = numpy.abs(over) < 1
    code = numpy.round(numpy.clip(over, -1, 1))
    by_step = numpy.where(inside, code - over, numpy.sign(over)) / numpy.sqrt(w.size)
    return code * step, inside.astype(float), by_step


def numpy_seq(w: Array, bound: float, whole: int = ROWS * SIZE) -> tuple[Array, Array, Array]:
    """StretchedElasticQuant of ParetoQ's code with 1.5 levels: the same three."""
    over = w / bound
    inside = numpy.abs(over) <= 0.99
    level = numpy.round(numpy.clip(over, -0.99, 0.99) * 1.5) / 1.5
    by_bound = numpy.where(inside, level - over, numpy.sign(over)) / numpy.sqrt(whole)
    return level * bound, inside.astype(float), by_bound


LEARNED_STATEMENTS: dict[str, Callable[[Array, float], tuple[Array, Array, Array]]] = {
    "lsq": numpy_lsq,
    "seq": numpy_seq,
}
STARTS: dict[str, Callable[[Array], float]] = {
    "lsq": lambda w: 2 * float(numpy.abs(w).mean()),
    "seq": lambda w: float(numpy.abs(w).max()),
}


def a_weight(dtype: torch.dtype = torch.float64) -> Tensor:
    weight = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[3] = 0
    weight[4, :40] *= 3
    return weight.to(dtype)


def grad(value: Tensor) -> Tensor:
    assert value.grad is not None
    return value.grad


def parts(granularity: Granularity) -> Iterator[tuple[Any, ...]]:
    """Yield the index of each part that shares a scale, in the order of the scales."""
    group = group_of(granularity)
    if granularity == "tensor":
        yield (slice(None), slice(None))
    else:
        for row in range(ROWS):
            for first in range(0, SIZE, group or SIZE):
                yield (row, slice(first, first + (group or SIZE)))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", FIXED, ids=lambda method: method.name)
def test_a_method_is_its_formula_for_each_part_with_a_scale(method: Any, granularity: Granularity) -> None:
    weight = a_weight()
    found = method.function(weight, granularity=granularity, clip=CLIP).numpy()
    for part in parts(granularity):
        clipped = numpy.clip(weight.numpy()[part], -CLIP, CLIP)
        expected = STATEMENTS[method.name](clipped.reshape(-1)).reshape(clipped.shape)
        numpy.testing.assert_allclose(found[part], expected, rtol=1e-12)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_codes_times_scale_is_the_value_of_training_bit_for_bit(
    method: Any, granularity: Granularity
) -> None:
    weight = a_weight(torch.float32)
    learned = [one.start(weight, granularity) + 0.01 for one in method.learned]
    value = method.function(weight, *learned, granularity=granularity)
    codes, scale, *shift = method.codes(weight, *learned, granularity=granularity)
    assert codes.dtype == torch.int8
    assert scale.shape == scale_shape(weight.shape, granularity)
    packed, group = numerics.pack_codes(codes), group_of(granularity)
    unpacked = numerics.unpack_ternary(packed, scale, weight.shape, weight.dtype, group, *shift)
    assert torch.equal(unpacked, value)
    assert len(shift) == method.shifts
    if not method.shifts:
        assert torch.equal(codes * spread(scale, group, SIZE), value)
    assert set(codes.unique().tolist()) == ({-1, 0, 1} if method.values == "ternary" else {-1, 1})
    assert (
        value.to(torch.bfloat16).dtype
        == method.function(weight.to(torch.bfloat16), *learned, granularity=granularity).dtype
    )


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", FIXED, ids=lambda method: method.name)
def test_the_gradient_is_straight_through_within_the_clip(method: Any, granularity: Granularity) -> None:
    weight = a_weight().requires_grad_()
    gradient = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    method.function(weight, granularity=granularity, clip=CLIP).backward(gradient)
    assert torch.equal(grad(weight), gradient * (weight.abs() < CLIP))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", STEPS, ids=lambda method: method.name)
def test_a_learned_step_has_its_formula_and_both_gradients(method: Any, granularity: Granularity) -> None:
    weight = a_weight().requires_grad_()
    step = method.learned[0].start(weight, granularity).requires_grad_()
    starts = step.detach().reshape(-1).numpy().copy()
    with torch.no_grad():
        step.mul_(0.6)  # so that some weights lie beyond its range
    gradient = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value = method.function(weight, step, granularity=granularity)
    torch.autograd.backward(value, gradient)
    of_step = grad(step).reshape(-1)
    for index, part in enumerate(parts(granularity)):
        own, size = weight.detach().numpy()[part], float(step.detach().reshape(-1)[index])
        assert starts[index] == pytest.approx(STARTS[method.name](own), rel=1e-12)
        expected, inside, by_step = LEARNED_STATEMENTS[method.name](own, max(size, 1e-5))
        numpy.testing.assert_allclose(value.detach().numpy()[part], expected, rtol=1e-12)
        numpy.testing.assert_array_equal(grad(weight).numpy()[part], inside * gradient.numpy()[part])
        summed = float((by_step * gradient.numpy()[part]).sum())
        assert float(of_step[index]) == pytest.approx(summed, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_dual_ternarisation_has_its_formula_and_three_gradients(granularity: Granularity) -> None:
    weight, method = a_weight().requires_grad_(), get_method("dlt")
    scale, shift = (one.start(weight, granularity).requires_grad_() for one in method.learned)
    assert torch.equal(method.function(weight, scale, shift, granularity), get_twn(weight, granularity))
    with torch.no_grad():
        scale.mul_(-1.5)
        shift.add_(0.1)
    gradient = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value: Tensor = method.function(weight, scale, shift, granularity)
    torch.autograd.backward(value, gradient)
    assert torch.equal(grad(weight), gradient)
    for index, part in enumerate(parts(granularity)):
        own, up = weight.detach().numpy()[part], gradient.numpy()[part]
        codes = numpy.sign(own) * (numpy.abs(own) > 0.7 * numpy.abs(own).mean())
        expected = codes * float(scale.detach().reshape(-1)[index]) + 0.1
        numpy.testing.assert_allclose(value.detach().numpy()[part], expected, rtol=1e-12)
        assert float(grad(scale).reshape(-1)[index]) == pytest.approx((codes * up).sum(), rel=1e-9)
        assert float(grad(shift).reshape(-1)[index]) == pytest.approx(up.sum(), rel=1e-9)


def get_twn(weight: Tensor, granularity: Granularity) -> Tensor:
    return numerics.ternary(weight, granularity, float("inf"))


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_a_compiled_method_is_one_graph_with_the_same_bits(method: Any) -> None:
    def loss(weight: Tensor, *learned: Tensor) -> Tensor:
        quantised: Tensor = method.function(weight, *learned, granularity="group-32")
        return quantised.square().sum()

    results = []
    for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=False)):
        weight = a_weight(torch.float32).requires_grad_()
        given = [weight, *(one.start(weight, "group-32").requires_grad_() for one in method.learned)]
        results.append(torch.autograd.grad(run(*given), given))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_the_scale_of_a_weight_with_nan_is_nan(method: Any) -> None:
    weight = a_weight()
    learned = [one.start(weight, "row") for one in method.learned]
    weight[1, 5] = float("nan")
    _, scale, *_ = method.codes(weight, *learned, granularity="row")
    assert scale[1].isnan()


def test_sherry_zeroes_exactly_one_of_four_neighbours() -> None:
    for weight in (a_weight(), torch.ones(2, 8)):  # equal magnitudes, too
        codes, _ = get_method("sherry").codes(weight, "row")
        assert ((codes == 0).view(-1, 4).sum(-1) == 1).all()
    with pytest.raises(ValueError, match="30 is no multiple of 4"):
        get_method("sherry").function(torch.ones(2, 30))


@pytest.mark.parametrize("method", FIXED, ids=lambda method: method.name)
def test_rows_that_are_looked_up_first_have_the_same_bits_and_gradients(method: Any) -> None:
    ids = torch.tensor([[1, 3, 1], [5, 0, 3]])
    results = []
    for first in (False, True):
        weight = a_weight(torch.float32).requires_grad_()
        if first:
            rows = numerics.quantised_embedding(weight, ids, method=method.name, clip=CLIP)
        else:
            rows = torch.nn.functional.embedding(ids, method.function(weight, granularity="row", clip=CLIP))
        torch.autograd.backward(rows, torch.arange(rows.numel(), dtype=torch.float32).view_as(rows))
        results.append((rows.detach(), grad(weight)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_methods_are_found_by_name_and_by_function() -> None:
    assert get_method("twn").function is numerics.ternary
    assert list(BY_FUNCTION) == [method.function for method in METHODS.values()]
    with pytest.raises(InputError, match="unknown method 'absmeen' of weights; did you mean 'absmean'"):
        get_method("absmeen")
    with pytest.raises(ValueError, match="use 'tensor' or 'row', or one of 'group-32', 'group-64'"):
        numerics.ternary_codes(torch.ones(2, 2), "group-48")  # type: ignore[arg-type]
