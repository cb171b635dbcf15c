"""Error-feedback rounding against plain NumPy in float64: the definition, the best codes there are, least squares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ti_fx.numerics import error_feedback as ef
from ti_fx.numerics import moments
from ti_fx.numerics.ternary_weights import ternary, ternary_codes

Array = NDArray[np.float64]


def problem(outputs: int, inputs: int, rows: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a target and the second moment of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64) @ mixed
    target = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return target, ef.damped(x.T @ x / rows, 0.05)


def test_rows_that_are_all_alike_are_factored() -> None:
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(5, generator=generator, dtype=torch.float64)
    alike = 30 * torch.outer(row, row)
    residue = alike - alike * (1 + 1e-15)  # what centring leaves of it
    factor = ef.cholesky(alike)
    torch.testing.assert_close(factor @ factor.T, alike, rtol=1e-10, atol=1e-10)
    for moment in (alike, residue, torch.zeros(5, 5, dtype=torch.float64)):
        assert ef.inverse_factor(ef.damped(moment, 0.0).float()).isfinite().all()
    with pytest.raises(RuntimeError, match="not positive-definite"):
        ef.cholesky(torch.full((2, 2), float("nan"), dtype=torch.float64))


def feedback_by_definition(target: Array, scale: float, moment: Array) -> Array:
    """Round input after input; what is left of the others then moves to its optimum given those that are fixed."""
    left, codes = target.copy(), np.zeros_like(target)
    for index in range(target.shape[1]):
        codes[:, index] = np.clip(np.round(left[:, index] / scale), -1, 1)
        inverse = np.linalg.inv(moment[index:, index:])
        lost = (left[:, index] - codes[:, index] * scale) / inverse[0, 0]
        left[:, index:] -= np.outer(lost, inverse[0])
    return codes


def test_feedback_is_that_of_the_definition_across_blocks() -> None:
    target, moment = problem(5, ef.BLOCK + 20)
    scale = torch.tensor(0.9, dtype=torch.float64)
    found = ef.feedback_codes(target, scale, ef.inverse_factor(moment))
    expected = feedback_by_definition(target.numpy(), 0.9, moment.numpy())
    np.testing.assert_array_equal(found.numpy(), expected)


def test_descent_sets_each_code_to_the_best_given_the_others() -> None:
    target, moment = problem(4, ef.BLOCK + 9)
    scale = torch.full((4, 1), 0.8, dtype=torch.float64)
    codes, _ = ternary_codes(target, "row")
    start = codes.double()
    found = ef.descended_codes(start, scale, target, moment)
    step = start.clone()
    for index in range(target.shape[1]):  # one by one, each value tried
        errors = []
        for value in (-1.0, 0.0, 1.0):
            step[:, index] = value
            errors.append(ef.error(step * scale, target, moment))
        step[:, index] = torch.stack(errors).argmin(0).double() - 1
    assert torch.equal(found, step)
    assert bool((ef.error(found * scale, target, moment) <= ef.error(start * scale, target, moment)).all())


def test_the_result_is_near_the_best_of_all_codes() -> None:
    target, moment = problem(6, 7)
    _, guess = ternary_codes(target, "row")
    codes, scale = ef.ternary_by_feedback(target, moment, guess)
    found = ef.error(codes * scale, target, moment)
    every = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=7)), dtype=torch.float64)
    size = ((every @ moment) * every).sum(1).clamp(min=1e-12)
    gain = (every @ moment @ target.T).clamp(min=0) ** 2 / size[:, None]
    whole = ef.error(torch.zeros_like(target), target, moment)
    best = whole - gain.max(0).values
    rounded = ef.error(ternary(target, "row"), target, moment)
    assert bool((found >= best - 1e-9).all())
    assert float(found.sum() - best.sum()) < 0.35 * float(rounded.sum() - best.sum())


@pytest.mark.parametrize("shape", [(), (3, 1), (1, 8)])
def test_scales_are_those_of_least_squares(shape: tuple[int, ...]) -> None:
    target, moment = problem(3, 8)
    codes, _ = ternary_codes(target)
    found = ef.fitted_scale(codes.double(), torch.ones(shape, dtype=torch.float64), target, moment)
    root = np.linalg.cholesky(moment.numpy()).T
    columns = []
    for place in np.ndindex(shape):
        own = np.zeros(shape)
        own[place] = 1.0
        columns.append((root @ (codes.numpy() * own).T).ravel())
    expected, *_ = np.linalg.lstsq(np.stack(columns, 1), (root @ target.numpy().T).ravel(), rcond=None)
    used = np.array([bool(column.any()) for column in columns])  # else the scale is as it was
    np.testing.assert_allclose(found.numpy().ravel()[used], np.clip(expected, 0, None)[used], rtol=1e-9)


@pytest.mark.parametrize("shape", [(), (3, 1), (1, 8)])
def test_what_shares_a_scale_goes_on_sharing_it(shape: tuple[int, ...]) -> None:
    target, moment = problem(3, 8)
    guess = torch.full(shape, 0.8, dtype=torch.float64)
    codes, scale = ef.ternary_by_feedback(target, moment, guess)
    assert scale.shape == guess.shape
    plain = ternary(target)
    assert float(ef.error(codes * scale, target, moment).sum()) < float(ef.error(plain, target, moment).sum())


def test_the_target_is_that_of_ridge_regression() -> None:
    generator = np.random.default_rng(0)
    x, y, weight = (
        generator.normal(size=(40, 6)),
        generator.normal(size=(40, 3)),
        generator.normal(size=(3, 6)),
    )
    given, second, cross = map(torch.from_numpy, (weight, x.T @ x, x.T @ y))
    found = ef.regression_target(given, second, cross, 0.3)
    added = 0.3 * np.mean(np.diag(x.T @ x))
    stacked = np.vstack([x, np.sqrt(added) * np.eye(6)])
    expected, *_ = np.linalg.lstsq(stacked, np.vstack([y, np.sqrt(added) * weight.T]), rcond=None)
    np.testing.assert_allclose(found.numpy(), expected.T, rtol=1e-9)


def test_an_error_from_sums_is_that_of_the_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, weight, bias = (
        torch.randn(*size, generator=generator) for size in ((50, 6), (50, 3), (3, 6), (3,))
    )
    read, given = moments.InputMoments(6, x.device), moments.OutputMoments(6, 3, x.device)
    for rows in (slice(0, 20), slice(20, 50)):
        read.add(x[rows])
        given.add(x[rows], y[rows])
    expected = (x @ weight.T + bias - y).square().sum() / (y - y.mean(0)).square().sum()
    sums = moments.Moments(read, given)
    assert moments.relative_error(sums, weight, bias) == pytest.approx(float(expected), rel=1e-5)
    second, cross = moments.centred(sums)
    torch.testing.assert_close(second.float(), (x - x.mean(0)).T @ (x - x.mean(0)) / 50)
    torch.testing.assert_close(cross.float(), (x - x.mean(0)).T @ (y - y.mean(0)) / 50)
    free = moments.fitted_bias(sums, weight).float()
    torch.testing.assert_close(free, (y - x @ weight.T).mean(0))
    second, cross = moments.without_bias(sums + sums, bias)
    torch.testing.assert_close(second.float(), x.T @ x / 50)
    torch.testing.assert_close(cross.float(), x.T @ (y - bias) / 50)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("seed", range(5))
def test_the_quantiser_makes_the_codes_and_scales_again_of_either_latent_weight(
    granularity: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 50, generator=generator) * 0.05
    moved = weight + 0.03 * torch.randn(6, 50, generator=generator)
    codes = ternary_codes(moved, "row")[0].float()
    codes[0] = 0 if granularity == "row" else codes[0]
    scale = torch.rand((6, 1) if granularity == "row" else (), generator=generator) * 0.1 + 0.02
    grid = ef.latents_on_grid(codes, scale)
    cell = ef.latents_in_cells(codes, scale, weight)
    for latent in (grid, cell):
        assert ef.has_codes(latent, codes, scale, granularity)
        made = ternary(latent, granularity)  # type: ignore[arg-type]
        torch.testing.assert_close(made, codes * scale, rtol=1e-6, atol=1e-9)
    assert float((cell - weight).square().sum()) < float((grid - weight).square().sum())
    assert not ef.has_codes(-grid, codes, scale, granularity)
    assert not ef.has_codes(grid * 1.01, codes, scale, granularity)
    assert not ef.has_codes(1000 * grid, codes, 1000 * scale, granularity)  # beyond the clip
