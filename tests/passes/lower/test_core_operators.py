"""Operators that torch.onnx would decompose: their core forms give the same, and then it traces nothing anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.errors import VersionError
from ti_fx.export import to_onnx
from ti_fx.frontend.internals import known_internal
from ti_fx.ir.edit import aten_name
from ti_fx.passes import Pack, QuantizeActivations, Ternarize
from ti_fx.passes.lower import WriteCoreOperators

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
DECOMPOSE = "torch.onnx._internal.exporter._fx_passes.decompose_with_registry"


class Computes(nn.Module):
    """Functions of x, beside a product, without which there is nothing to pack."""

    def __init__(self, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.functions = functions
        self.linear = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.linear(x), *(function(x) for function in self.functions))


def added(x: Tensor) -> Tensor:
    y = x * 2
    y += x
    return y


def added_to_what_is_read_again(x: Tensor) -> Tensor:
    y = x * 2
    first = y[:, :2]
    y += x
    return first.sum() + y


def added_to_a_view(x: Tensor) -> Tensor:
    y = x * 2
    first = y[:, :2]
    first += 1
    return y


def added_to_fewer_bits(x: Tensor) -> Tensor:
    return (x * 2).half().mul(2).add_(x).float()


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "and": lambda x: ((x > 0) & (x < 1)).float(),
    "or": lambda x: ((x > 0) | (x < -1)).float(),
    "xor": lambda x: ((x > 0) ^ (x < 1)).float(),
    "min": lambda x: torch.min(x, x.flip(0)),
    "max": lambda x: torch.max(x, x.flip(0)),
    "to": lambda x: x.to(torch.float64).to(torch.int32).to(torch.float32),
    "to-device": lambda x: (x > 0).to("cpu", torch.float32),
    "diff": lambda x: x.diff(),
    "diff-along": lambda x: x[:, :, None].diff(1, 1),
    "diff-between": lambda x: x.diff(1, 1, x[:, :1], x[:, 1:2]),
    "pool": lambda x: nn.functional.adaptive_avg_pool1d(x, 1),
    "in-place": added,
    "in-place-sub": lambda x: (x * 2).sub_(x, alpha=3),
    "in-place-mul": lambda x: (x * 2).mul_(x),
    "in-place-div": lambda x: (x * 2).div_(x.abs() + 1),
}
LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "read-again": added_to_what_is_read_again,
    "a-view": added_to_a_view,
    "diff-twice": lambda x: x.diff(2),
}


def packed(*functions: Callable[[Tensor], Tensor]) -> GraphModule:
    torch.manual_seed(0)
    gm = ti_fx.capture(Computes(*functions), {"x": X})
    ti_fx.Pipeline(Ternarize(), QuantizeActivations(), Pack())(gm)
    return gm.eval()


def require_equal(path: Path, functions: list[Callable[[Tensor], Tensor]], *inputs: Tensor) -> None:
    session = onnxruntime.InferenceSession(path)
    for x in inputs:
        for found, function in zip(session.run(None, {"x": x.numpy()})[1:], functions, strict=True):
            np.testing.assert_allclose(found, function(x).numpy(), rtol=1e-6, atol=1e-6)


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Note each call of torch.onnx's decomposition."""
    calls: list[Any] = []
    original = known_internal(DECOMPOSE)

    def noted(exported_program: Any, registry: Any) -> Any:
        calls.append(exported_program)
        return original(exported_program, registry)

    monkeypatch.setattr(DECOMPOSE, noted)
    return calls


def test_the_core_form_gives_the_same_bits() -> None:
    functions = {**FUNCTIONS, **LEFT, "fewer-bits": added_to_fewer_bits}
    gm = packed(*functions.values())
    before = gm(x=X)
    ti_fx.Pipeline(WriteCoreOperators())(gm)
    for name, old, new in zip(["linear", *functions], before, gm(x=X), strict=True):
        assert torch.equal(old, new), name


def test_what_is_read_again_is_still_written_in_place() -> None:
    gm = packed(added_to_what_is_read_again, added_to_a_view, added_to_fewer_bits, added)
    ti_fx.Pipeline(WriteCoreOperators())(gm)
    assert [aten_name(node) for node in gm.graph.nodes].count("add_") == 3


def test_nothing_is_left_to_decompose(tmp_path: Path, decomposed: list[Any]) -> None:
    functions = list(FUNCTIONS.values())
    to_onnx(packed(*functions), tmp_path / "all.onnx", example={"x": X})
    assert not decomposed
    require_equal(tmp_path / "all.onnx", functions, X, X.repeat(2, 1)[:7])


def test_what_is_left_is_decomposed_as_before(tmp_path: Path, decomposed: list[Any]) -> None:
    functions = list(LEFT.values())
    to_onnx(packed(*functions), tmp_path / "left.onnx", example={"x": X})
    assert len(decomposed) == 1
    require_equal(tmp_path / "left.onnx", functions, X)


def test_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = packed(FUNCTIONS["and"])
    monkeypatch.setattr(DECOMPOSE, lambda program: program)
    with pytest.raises(
        VersionError, match=r"^ti_fx knows torch .*\.decompose_with_registry takes \(program\)"
    ):
        to_onnx(graph, tmp_path / "none.onnx", example={"x": X})
    assert not list(tmp_path.iterdir())
