"""Fake-quantisation against independent statements of it: NumPy for the formulas, ONNX Runtime for its own operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from slow import slow
from torch import Tensor

from ti_fx import numerics
from ti_fx.numerics.quantisers import QUANTISERS

GRANULARITIES: tuple[numerics.Granularity, ...] = ("tensor", "row")
FAKE_QUANTS = [quantiser.function for quantiser in QUANTISERS.values() if quantiser.start is None]
Array = NDArray[numpy.float32]


def numpy_ternary(weight: NDArray[numpy.float64], clip: float) -> NDArray[numpy.float64]:
    """Ternary Weight Networks, equations 5 and 6: threshold 0.7·mean|W|, scale = mean of |W| above it."""
    weight = numpy.clip(weight, -clip, clip)
    threshold = 0.7 * numpy.abs(weight).mean()
    above = numpy.abs(weight) > threshold
    scale = numpy.abs(weight)[above].mean() if above.any() else 0.0
    result: NDArray[numpy.float64] = numpy.sign(weight) * above * scale
    return result


@pytest.mark.parametrize("clip", [2.5, 0.5])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ternary_is_the_papers_formula(
    granularity: Literal["tensor", "row"], clip: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 30, generator=generator, dtype=dtype) * 1.5
    weight[3] = 0  # a row without any weight
    rows = [weight] if granularity == "tensor" else list(weight)
    expected = numpy.concatenate([numpy_ternary(row.double().numpy(), clip).reshape(-1) for row in rows])
    actual = numerics.ternary(weight, granularity, clip)
    assert actual.dtype == dtype
    # the mean of 1200 numbers is summed in another order: a few units in the last place
    numpy.testing.assert_allclose(
        actual.double().numpy().reshape(-1), expected, rtol=20 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_codes_times_scale_is_the_ternary_weight(granularity: Literal["tensor", "row"]) -> None:
    weight = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0))
    codes, scale = numerics.ternary_codes(weight, granularity)
    assert codes.dtype == torch.int8
    assert codes.shape == weight.shape
    assert set(codes.flatten().tolist()) == {-1, 0, 1}
    assert scale.shape == (() if granularity == "tensor" else (8, 1, 1))
    assert torch.equal(codes * scale, numerics.ternary(weight, granularity))


@pytest.mark.parametrize(
    "weight", [torch.zeros(4, 4), torch.ones(4, 4), torch.full((4, 4), -3.0), torch.ones(1)]
)
def test_constant_weights(weight: Tensor) -> None:
    expected = weight.clamp(-2.5, 2.5)
    for granularity in GRANULARITIES:
        assert torch.equal(numerics.ternary(weight, granularity), expected)


def test_an_unknown_granularity_is_refused() -> None:
    with pytest.raises(ValueError, match="'tensor' or 'row'"):
        numerics.ternary_codes(torch.ones(2, 2), "column")  # type: ignore[arg-type]


def test_the_ternary_gradient_is_straight_through_inside_the_clip_and_zero_outside() -> None:
    weight = torch.tensor([[-4.0, -2.5, -1.0, 0.0], [0.1, 2.4999, 2.5, 3.0]], requires_grad=True)
    gradient = torch.arange(1.0, 9.0).view(2, 4)
    for granularity in GRANULARITIES:
        ternary = numerics.ternary(weight, granularity)
        (actual,) = torch.autograd.grad((ternary * gradient).sum(), weight)
        assert actual.tolist() == [[0, 0, 3, 4], [5, 6, 0, 0]]


def dynamic_quantize_linear() -> Callable[[Array], Array]:
    """Return ONNX Runtime's DynamicQuantizeLinear followed by DequantizeLinear."""
    helper = onnx.helper
    value = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
        ],
        "quantise",
        [helper.make_tensor_value_info("x", value, ["n"])],
        [helper.make_tensor_value_info("y", value, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(["y"], {"x": x})[0]


def random_values(kind: str) -> Array:
    generator = numpy.random.default_rng(0)
    values: Array = generator.standard_normal(100_000).astype(numpy.float32)
    if kind == "gelu":
        return torch.nn.functional.gelu(torch.from_numpy(values)).numpy()
    if kind == "outliers":
        values[::1000] *= 100
    return values


CASES: dict[str, Array] = {
    "normal": random_values("normal"),
    "gelu": random_values("gelu"),
    "outliers": random_values("outliers"),
    "positive": numpy.abs(random_values("normal")) + 1,
    "negative": -numpy.abs(random_values("normal")) - 1,
    "tiny": random_values("normal") * numpy.float32(1e-30),
    "zeros": numpy.zeros(7, numpy.float32),
    "constant": numpy.full(7, 3.25, numpy.float32),
    "negative constant": numpy.full(7, -3.25, numpy.float32),
    "one element": numpy.array([0.7], numpy.float32),
    "one zero": numpy.array([0.0], numpy.float32),
}


@pytest.mark.parametrize("name", CASES)
def test_int8_tensor_is_onnx_runtimes_dynamic_quantize_linear(name: str) -> None:
    values = CASES[name]
    expected = dynamic_quantize_linear()(values)
    actual = numerics.int8_tensor(torch.from_numpy(values)).numpy()
    numpy.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("per_token", [True, False])
def test_symmetric_int8_is_its_formula(per_token: bool) -> None:
    value = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value[0, 0] = 0
    scale = value.abs().amax(-1, keepdim=True) / 127 if per_token else value.abs().max() / 127
    scale = torch.where(scale == 0, 1.0, scale)
    expected = numpy.clip(numpy.round((value / scale).numpy()), -127, 127) * scale.numpy()
    function = numerics.int8_token if per_token else numerics.int8_reference
    numpy.testing.assert_array_equal(function(value).numpy(), expected)


@pytest.mark.parametrize("function", FAKE_QUANTS)
def test_activation_quantisers_pass_the_gradient_through(function: Callable[[Tensor], Tensor]) -> None:
    value = (10 * torch.randn(3, 4, generator=torch.Generator().manual_seed(0))).requires_grad_()
    gradient = torch.randn(3, 4)
    (actual,) = torch.autograd.grad(function(value), value, gradient)
    assert torch.equal(actual, gradient)


@pytest.mark.parametrize("function", FAKE_QUANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_quantisers_keep_shape_and_dtype(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    value = torch.randn(2, 3, 4).to(dtype)
    result = function(value)
    assert result.dtype == dtype
    assert result.shape == value.shape
    # 16-bit values are quantised in float32, then rounded once
    wide = value if dtype == torch.float64 else value.float()
    assert torch.equal(result, function(wide).to(dtype))


def test_float64_is_quantised_in_float64() -> None:
    value = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = numerics.int8_reference(value) / (value.abs().max() / 127)
    assert (levels - levels.round()).abs().max() < 1e-12  # float32 arithmetic would leave 1e-6


@pytest.mark.parametrize("function", [numerics.ternary, *FAKE_QUANTS])
def test_statistics_are_in_float32_under_autocast(function: Callable[[Tensor], Tensor]) -> None:
    value = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = function(value)
    assert under.dtype == torch.float32
    assert torch.equal(under, function(value))


@pytest.mark.seconds
@pytest.mark.parametrize(
    "function",
    [numerics.ternary, numerics.int8_block_128, *slow(lambda w: numerics.ternary(w, "row"), *FAKE_QUANTS)],
)
def test_compiled_equals_eager(function: Callable[[Tensor], Tensor]) -> None:
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend="aot_eager")
    for shape in ((4, 6), (5, 7), (2, 3)):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        left, right = value.clone().requires_grad_(), value.clone().requires_grad_()
        expected, actual = function(left), compiled(right)
        assert torch.equal(actual, expected)
        expected.square().sum().backward()  # type: ignore[no-untyped-call]
        actual.square().sum().backward()  # type: ignore[no-untyped-call]
        assert left.grad is not None
        assert right.grad is not None
        assert torch.equal(left.grad, right.grad)
    torch._dynamo.reset()
