"""The ONNX constructs compute what ``ti_fx.numerics`` computes: each operator alone, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

from ti_fx import numerics
from ti_fx.numerics.codes import pack_codes
from ti_fx.numerics.layouts import LAYOUTS
from ti_fx.numerics.quantisers import QUANTISERS

ROWS, COLUMNS = 200, 500  # 1e5 values


def run_nodes(
    nodes: list[onnx.NodeProto],
    feed: dict[str, NDArray[Any]],
    constants: dict[str, NDArray[Any]] | None = None,
) -> NDArray[Any]:
    """Run ONNX nodes whose last output is called ``out``."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feed.items()
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        inputs,
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    result: NDArray[Any] = session.run(["out"], feed)[0]
    return result


def values() -> list[Tensor]:
    """Ordinary, skewed, one-sided, constant and all-zero activations."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(ROWS, COLUMNS, generator=generator)
    zero_row = normal.clone()
    zero_row[3] = 0
    return [
        normal,
        torch.nn.functional.gelu(normal * 3),
        normal.abs() + 1,
        -normal.abs() * 1e-3,
        normal * 1e4,
        zero_row,
        torch.zeros(ROWS, COLUMNS),
        torch.full((ROWS, COLUMNS), 0.7),
        torch.full((ROWS, COLUMNS), -2.5),
    ]


def tensor_nodes() -> list[onnx.NodeProto]:
    return [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["out"]),
    ]


def symmetric_nodes(axes: bool) -> list[onnx.NodeProto]:
    attributes: dict[str, Any] = {"axis": -1, "block_size": COLUMNS} if axes else {}
    return [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("ReduceMax", ["a", *(["last"] if axes else [])], ["m"], keepdims=int(axes)),
        helper.make_node("Div", ["m", "levels"], ["d"]),
        helper.make_node("Equal", ["d", "nothing"], ["e"]),
        helper.make_node("Where", ["e", "one", "d"], ["s"]),
        helper.make_node("Shape", ["s"], ["shape"]),
        helper.make_node("Expand", ["middle", "shape"], ["z"]),
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("Cast", ["q"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["f", "centre"], ["c"]),
        helper.make_node("Mul", ["c", "s"], ["out"]),
    ]


CONSTANTS: dict[str, NDArray[Any]] = {
    "levels": np.array(127, np.float32),
    "nothing": np.array(0, np.float32),
    "one": np.array(1, np.float32),
    "middle": np.array(128, np.uint8),
    "centre": np.array(128, np.float32),
    "last": np.array([-1], np.int64),
}


@pytest.mark.parametrize(
    ("function", "nodes"),
    [
        (numerics.int8_tensor, tensor_nodes()),
        (numerics.int8_token, symmetric_nodes(axes=True)),
        (numerics.int8_reference, symmetric_nodes(axes=False)),
    ],
    ids=["int8-tensor", "int8-token", "reference"],
)
def test_quantisers_of_onnx_runtime_equal_the_training_numerics_bit_for_bit(
    function: Callable[[Tensor], Tensor], nodes: list[onnx.NodeProto]
) -> None:
    constants = {} if function is numerics.int8_tensor else CONSTANTS
    for value in values():
        used = {name for node in nodes for name in node.input}
        kept = {name: constant for name, constant in constants.items() if name in used}
        found = run_nodes(nodes, {"x": value.numpy()}, kept)
        np.testing.assert_array_equal(found, function(value).numpy())


def block_product(codes: NDArray[np.int8], block: int, bias: bool) -> list[onnx.NodeProto]:
    outputs, inputs = codes.shape
    return [
        helper.make_node(
            "MatMulNBits",
            ["x", "codes", "scale", *(["", "", "bias"] if bias else [])],
            ["out"],
            domain="com.microsoft",
            K=inputs,
            N=outputs,
            bits=2,
            block_size=block,
            accuracy_level=4,
        )
    ]


def block_constants(codes: NDArray[np.int8], block: int, scale: float) -> dict[str, NDArray[Any]]:
    outputs, inputs = codes.shape
    blocks = -(-inputs // block)
    whole = np.pad(codes, ((0, 0), (0, blocks * block - inputs)))
    stored = LAYOUTS["uint2"].encode(pack_codes(torch.from_numpy(whole)), whole.shape).numpy()
    return {
        "codes": stored.reshape(outputs, blocks, block // 4),
        "scale": np.full((outputs, blocks), scale, np.float32),
    }


BLOCK_FUNCTIONS = {128: numerics.int8_block_128, 64: numerics.int8_block_64, 32: numerics.int8_block_32}


@pytest.mark.parametrize("block", BLOCK_FUNCTIONS)
@pytest.mark.parametrize("rows", [1, 300])
def test_block_products_round_as_the_training_numerics(block: int, rows: int) -> None:
    """Values on, above and below every rounding boundary, through the identity: the codes come out, times the scale.

    Only the last bits of the sum differ, far less than one code. One row and many rows take different ways.
    """
    inputs = 200  # the last block is shorter
    random = np.random.default_rng(0)
    largest = np.exp(random.standard_normal((rows, 1))).astype(np.float32)
    halves = random.integers(-126, 126, (rows, inputs)).astype(np.float32) + np.float32(0.5)
    value = halves * (
        largest / np.float32(127)
    )  # float32 puts these a hair above or below the boundary, or on it
    value[:, ::32] = largest
    value[-1, :block] = 0
    identity = np.eye(inputs, dtype=np.int8)
    found = run_nodes(
        block_product(identity, block, False), {"x": value}, block_constants(identity, block, 1.0)
    )
    expected = BLOCK_FUNCTIONS[block](torch.from_numpy(value)).numpy()
    np.testing.assert_allclose(found, expected, atol=0.01 * float(largest.max()) / 127)


@pytest.mark.parametrize("block", BLOCK_FUNCTIONS)
@pytest.mark.parametrize("rows", [1, 7])
def test_block_products_keep_the_bias(block: int, rows: int) -> None:
    random = np.random.default_rng(0)
    codes = random.integers(-1, 2, (24, 200)).astype(np.int8)
    value = random.standard_normal((rows, 200)).astype(np.float32)
    constants = block_constants(codes, block, 0.03) | {"bias": np.full(24, 100, np.float32)}
    found = run_nodes(block_product(codes, block, True), {"x": value}, constants)
    quantised = BLOCK_FUNCTIONS[block](torch.from_numpy(value)).double().numpy()
    np.testing.assert_allclose(found, quantised @ (codes.T * np.float32(0.03)) + 100, rtol=1e-6)


def integer_product(order: list[tuple[str, str, str]]) -> list[onnx.NodeProto]:
    return [
        helper.make_node("MatMulInteger", ["q", "w", "zero"], ["total"]),
        helper.make_node("Cast", ["total"], ["f"], to=TensorProto.FLOAT),
        *(helper.make_node("Mul", [left, right], [result]) for left, right, result in order),
        helper.make_node("Add", ["product", "bias"], ["out"]),
    ]


def test_a_row_scale_multiplied_last_keeps_the_bias() -> None:
    """The order of multiplications in ``ops.integer_linear``; the other order is the bug of ONNX Runtime 1.31."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 255, (6, 16), dtype=np.uint8)
    weight = random.integers(-1, 2, (16, 8)).astype(np.int8)
    row_scale = random.random((6, 1), dtype=np.float32) + 0.5
    constants: dict[str, NDArray[Any]] = {
        "w": weight,
        "ws": np.array(0.03, np.float32),
        "bias": np.full(8, 100, np.float32),
        "zero": np.array(128, np.uint8),
    }
    exact = (codes.astype(np.int64) - 128) @ weight.astype(np.int64) * 0.03 * row_scale + 100
    feed = {"q": codes, "s": row_scale}
    ours = run_nodes(integer_product([("f", "ws", "scaled"), ("scaled", "s", "product")]), feed, constants)
    np.testing.assert_allclose(ours, exact, rtol=1e-6)  # float32 products of exact integers


def few_bits(bits: int, axes: bool) -> tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]:
    """Asymmetric codes, of a tensor or of each row: bounds, QuantizeLinear, and Clip for what rounds too far."""
    bounds = ["last"] if axes else []
    attributes: dict[str, Any] = {"axis": -1, "block_size": COLUMNS} if axes else {}
    nodes = [
        helper.make_node("ReduceMin", ["x", *bounds], ["least"], keepdims=int(axes)),
        helper.make_node("ReduceMax", ["x", *bounds], ["most"], keepdims=int(axes)),
        helper.make_node("Min", ["least", "nothing"], ["low"]),
        helper.make_node("Max", ["most", "nothing"], ["high"]),
        helper.make_node("Sub", ["high", "low"], ["span"]),
        helper.make_node("Div", ["span", "levels"], ["d"]),
        helper.make_node("Equal", ["d", "nothing"], ["e"]),
        helper.make_node("Where", ["e", "one", "d"], ["s"]),
        helper.make_node("Neg", ["low"], ["below"]),
        helper.make_node("Div", ["below", "s"], ["place"]),
        helper.make_node("Round", ["place"], ["float_zero"]),
        helper.make_node("Cast", ["float_zero"], ["z"], to=TensorProto.UINT8),
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["any"], **attributes),
        helper.make_node("Clip", ["any", "", "limit"], ["q"]),
        helper.make_node("Cast", ["q"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["f", "float_zero"], ["c"]),
        helper.make_node("Mul", ["c", "s"], ["out"]),
    ]
    constants: dict[str, NDArray[Any]] = {
        "levels": np.array(2**bits - 1, np.float32),
        "limit": np.array(2**bits - 1, np.uint8),
        "nothing": np.array(0, np.float32),
        "one": np.array(1, np.float32),
    }
    return nodes, constants | ({"last": np.array([-1], np.int64)} if axes else {})


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("axes", [False, True], ids=["tensor", "token"])
def test_asymmetric_codes_of_few_bits_equal_the_training_numerics_bit_for_bit(bits: int, axes: bool) -> None:
    name = f"int{bits}_token_asymmetric" if axes else f"int{bits}_tensor"
    ties = torch.tensor([7.5, -7.5, 1.5, -1.5, 0.5, -0.5, 127.5, -127.5]).repeat(ROWS, COLUMNS // 8 + 1)
    nodes, constants = few_bits(bits, axes)
    for value in (*values(), ties[:, :COLUMNS]):
        found = run_nodes(nodes, {"x": value.numpy()}, constants)
        np.testing.assert_array_equal(found, QUANTISERS[name].function(value).numpy())


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("axes", [False, True], ids=["tensor", "token"])
def test_symmetric_codes_of_few_bits_equal_the_training_numerics_bit_for_bit(bits: int, axes: bool) -> None:
    name = f"int{bits}_token" if axes else f"int{bits}_tensor_symmetric"
    constants = CONSTANTS | {"levels": np.array(2 ** (bits - 1) - 1, np.float32)}
    used = {name for node in symmetric_nodes(axes) for name in node.input}
    kept = {name: constant for name, constant in constants.items() if name in used}
    for value in values():
        found = run_nodes(symmetric_nodes(axes), {"x": value.numpy()}, kept)
        np.testing.assert_array_equal(found, QUANTISERS[name].function(value).numpy())


def test_onnx_runtime_takes_one_zero_point_for_all_rows() -> None:
    """So those of tokens leave the product with the sums of the weight's columns; to be simplified once this passes."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 15, (6, 16), dtype=np.uint8)
    zero_points = random.integers(0, 15, 6, dtype=np.uint8)
    weight = random.integers(-1, 2, (16, 8)).astype(np.int8)
    exact = (codes.astype(np.int64) - zero_points[:, None]) @ weight.astype(np.int64)
    product = [
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["total"]),
        helper.make_node("Cast", ["total"], ["out"], to=TensorProto.FLOAT),
    ]
    with pytest.raises(Exception, match="zero point must be a scalar"):
        run_nodes(product, {"q": codes, "z": zero_points}, {"w": weight})
    sums = [
        helper.make_node("MatMulInteger", ["q", "w"], ["total"]),
        helper.make_node("Cast", ["z"], ["zero"], to=TensorProto.INT32),
        helper.make_node("Mul", ["zero", "columns"], ["away"]),
        helper.make_node("Sub", ["total", "away"], ["left"]),
        helper.make_node("Cast", ["left"], ["out"], to=TensorProto.FLOAT),
    ]
    columns = weight.astype(np.int32).sum(0, dtype=np.int32)
    found = run_nodes(sums, {"q": codes, "z": zero_points[:, None]}, {"w": weight, "columns": columns})
    np.testing.assert_array_equal(found, exact)
