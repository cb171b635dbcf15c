"""Graphs that are written in an unusual way are exported, and compute what they say."""

from __future__ import annotations

import operator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported_models import Layers, layers_example, packed
from slow import slow
from torch import Tensor
from torch.fx import Graph

from ti_fx.export import Runtime, to_onnx
from ti_fx.export.compare.nodes import choice_of


@pytest.mark.slow
def test_a_number_before_a_tensor_and_a_needless_squeeze_are_exported(tmp_path: Path) -> None:
    class Masked(Layers):
        def forward(self, values: Tensor, mask: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            kept = (1.0 - mask) * torch.add(0.25, mask == 0, alpha=0.5)
            # a squeeze of a dimension that is not 1 does nothing, and ONNX has no such squeeze
            return super().forward((values * kept.unsqueeze(-1)).squeeze(1))

    example = {**layers_example(), "mask": torch.tensor([[0, 1, 0, 0, 1]]).expand(3, 5).contiguous()}
    report = to_onnx(packed(Masked(), example), tmp_path / "masked.onnx", example)
    assert report.parity.nodes is not None


def test_a_small_number_is_not_taken_for_nothing(tmp_path: Path) -> None:
    """The exporter's optimiser takes 1e-8 for 0 and 1.000005 for 1."""

    class Small(Layers):
        def forward(self, values: Tensor) -> dict[str, Tensor]:
            size = (values * 1e-4).pow(2).mean(-1, keepdim=True)
            return super().forward(values / (size + 1e-8).sqrt() * (size * 1.000005 / size))

    report = to_onnx(packed(Small(), layers_example()), tmp_path / "small.onnx", layers_example())
    stored = {
        float(onnx.numpy_helper.to_array(one).flat[0]) for one in onnx.load(report.path).graph.initializer
    }
    assert any(value == np.float32(1e-8) for value in stored)
    assert any(value == np.float32(1.000005) for value in stored)


@pytest.mark.slow
def test_places_in_an_ascending_sequence_are_counted(tmp_path: Path) -> None:
    """ONNX has no searchsorted."""

    class Placed(Layers):
        def forward(self, values: Tensor) -> dict[str, Tensor]:
            ends = values.abs().mul(4).round().cumsum(-1)  # ascending, with equal ones
            edges = torch.tensor([2.0, 5.0, 5.0, 9.0])
            among = torch.searchsorted(edges, ends) + torch.searchsorted(ends, ends / 2, right=True)
            return super().forward(values + among * 0.1)

    report = to_onnx(packed(Placed(), layers_example()), tmp_path / "placed.onnx", layers_example())
    assert report.parity.nodes is not None


def test_parts_of_a_size_that_is_not_fixed_and_masks_as_outputs(tmp_path: Path) -> None:
    """ProphetNet's streams, of as many words each; Gemma 3n's ear returns which frames count."""

    class Streams(Layers):
        def forward(self, values: Tensor) -> dict[str, Tensor]:
            first, *others = torch.cat((values, values * 2, values * 3), 1).chunk(3, dim=1)
            return {**super().forward(first + others[1]), "large": values > 0.5}

    student = packed(Streams(), layers_example(), "float")
    report = to_onnx(student, tmp_path / "streams.onnx", layers_example())
    assert report.parity.nodes is not None


@pytest.mark.slow
def test_outputs_may_have_several_rows_for_each_of_the_batch(tmp_path: Path) -> None:
    """Codebooks: with the batch in another order, rows change places by groups."""

    class Books(Layers):
        def forward(self, values: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(values)["logits"].reshape(values.shape[0] * 2, -1)}

    report = to_onnx(packed(Books(), layers_example()), tmp_path / "books.onnx", layers_example())
    assert any("permuted" in row.case for row in report.parity.differences)


def test_an_input_that_is_returned_keeps_its_name(tmp_path: Path) -> None:
    class Returning(Layers):
        def forward(self, values: Tensor) -> dict[str, Tensor]:
            return {**super().forward(values), "values": values, "again": values}

    report = to_onnx(packed(Returning(), layers_example()), tmp_path / "returning.onnx", layers_example())
    runtime = Runtime(report.path)
    assert (list(runtime.inputs), list(runtime.outputs)) == (["values"], ["logits", "output_values", "again"])
    found = runtime(layers_example())
    for name in ("output_values", "again"):
        np.testing.assert_array_equal(found[name], layers_example()["values"])


def test_equals_may_be_chosen_in_any_order() -> None:
    """What topk returns of equal values is open, and with it the indices, in whatever type they are read."""
    graph = Graph()
    source = graph.placeholder("source")
    chosen = graph.call_function(torch.ops.aten.topk.default, (source, 3))
    places = graph.call_function(operator.getitem, (chosen, 1))
    short = graph.call_function(torch.ops.aten.to.dtype, (places, torch.int32))
    values = {source: torch.tensor([[4.0, 0.0, 7.0, 0.0]])}
    for node, dtype in ((places, torch.int64), (short, torch.int32)):
        pair = [torch.tensor([[2, 0, last]], dtype=dtype) for last in (1, 3)]
        choice = choice_of(node, pair[0], values)
        assert choice is not None
        got, expected = map(choice.in_order, pair)
        assert torch.equal(got, expected)
        assert not torch.equal(got, choice.in_order(torch.tensor([[2, 1, 3]], dtype=dtype)))


@pytest.mark.parametrize("encoding", ["int8-token", *slow("float")])
def test_rows_that_are_no_numbers_are_compared_as_such(encoding: str, tmp_path: Path) -> None:
    """A row that is all padding: NaN in both. The allowance for the others is that of their own range."""

    class Padded(Layers):
        def forward(self, values: Tensor) -> dict[str, Tensor]:
            logits = super().forward(values)["logits"]
            return {
                "logits": torch.where(values[..., :1] > 0.5, logits / torch.zeros_like(logits) * 0, logits)
            }

    example = layers_example()
    report = to_onnx(packed(Padded(), example, encoding), tmp_path / "padded.onnx", example)
    assert all(0 < row.span < 100 and 0 < row.allowed < 100 for row in report.parity.differences)
