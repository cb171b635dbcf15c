"""Constructs that stand between a model and one graph: what is captured, what is fixed, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

import ti_fx
from ti_fx.errors import InputError, RandomnessError
from ti_fx.export import to_onnx
from ti_fx.frontend.dynamic_sizes import may_hold
from ti_fx.passes import DuplicateTeacher, Pack, QuantizeActivations, Strip, Ternarize
from ti_fx.zoo import build


def values(model: nn.Module, example: dict[str, Tensor], training: bool = False) -> Tensor:
    model.train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        result: Tensor = model(**example)
    return result


def equal(model: nn.Module, gm: GraphModule, example: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(values(model, example, training), values(gm, example, training))
        for training in (False, True)
    )


class Images(nn.Module):
    """Attends within each image of a packed sequence, as vision towers of language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.places = nn.Embedding(16, 8)

    def forward(self, pixels: Tensor, grid: Tensor, ids: Tensor) -> Tensor:
        hidden = self.linear(pixels) + self.places(ids)
        if max(grid.prod(-1).tolist()) > 5:
            hidden = hidden * 2
        return torch.cat([part - part.mean(0) for part in hidden.split(grid.prod(-1).tolist())])


def test_an_input_that_steers_python_is_a_constant_and_said_so() -> None:
    model = Images()
    example = {
        "pixels": torch.randn(10, 8),
        "grid": torch.tensor([[2, 2], [2, 3]]),
        "ids": torch.arange(10),
    }
    gm = ti_fx.capture(model, example)
    assert equal(model, gm, example)
    assert "Python numbers" in ti_fx.capture_report(gm).static["grid.0"]
    assert "ids.0" not in {
        name for name, why in ti_fx.capture_report(gm).static.items() if "Python numbers" in why
    }
    with pytest.raises(InputError, match="input 'grid' steers Python in the model"):
        gm(**{**example, "grid": torch.tensor([[2, 3], [2, 2]])})
    with pytest.raises(InputError, match="input 'grid' steers Python in the model"):
        ti_fx.fork(gm)(**{**example, "grid": torch.tensor([[2, 3], [2, 2]])})


class TokensSteer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.table(input_ids)
        return hidden if bool((input_ids == 3).any()) else -hidden


def test_token_ids_are_never_constants_but_what_they_decide_is_checked() -> None:
    model, example = TokensSteer(), {"input_ids": torch.tensor([[1, 2], [3, 4]])}
    gm = ti_fx.capture(model, example)
    other = {"input_ids": torch.tensor([[3, 2, 7]])}
    assert torch.equal(values(gm, other), values(model, other))
    with pytest.raises(
        RuntimeError, match=r"decide otherwise at test_capture_constructs\.py:\d+, which read True"
    ):
        gm(input_ids=torch.tensor([[1, 2, 7]]))


class LayerDrop(nn.Module):
    def __init__(self, probability: float) -> None:
        super().__init__()
        self.linear, self.dropout, self.probability = nn.Linear(4, 4), nn.Dropout(0.5), probability

    def forward(self, value: Tensor) -> Tensor:
        drawn = torch.rand([])
        if not (self.training and drawn < self.probability):
            value = self.linear(value)
        result: Tensor = self.dropout(value)
        return result


def test_a_layer_dropped_at_random_is_refused_and_one_that_never_is_is_captured() -> None:
    example = {"value": torch.randn(3, 4)}
    with pytest.raises(
        RandomnessError, match=r"decides by a random number .*test_capture_constructs\.py:\d+"
    ):
        ti_fx.capture(LayerDrop(0.1), example)
    gm = ti_fx.capture(LayerDrop(0.0), example)
    assert values(gm, example, training=True).count_nonzero() < 12


class Clamped(nn.Module):
    """Clamps overflows in training alone, as DETR's encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, value: Tensor) -> Tensor:
        value = self.dropout(self.linear(value))
        if self.training and not torch.isfinite(value).all():
            value = value.clamp(-1e4, 1e4)
        return value


def test_control_flow_that_only_training_has_is_left_out_and_dropout_is_not() -> None:
    model, example = Clamped(), {"value": torch.randn(3, 4)}
    assert equal(model, ti_fx.capture(model, example), example)


class Dropouts(nn.Module):
    """A dropout in place, one that is off for good, and one as usual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Tensor:
        value = nn.functional.dropout(self.first(value), 0.5, self.training, inplace=True)
        value = nn.functional.dropout(self.second(value), 0.5, training=False)
        return nn.functional.dropout(value, 0.5, self.training)


def test_every_dropout_is_what_it_is_in_the_model() -> None:
    model, example = Dropouts(), {"value": torch.randn(3, 4)}
    assert equal(model, ti_fx.capture(model, example), example)


class Written(nn.Module):
    """Writes its values into an empty tensor, part by part, and casts a module to the dtype that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Tensor:
        self.second = self.second.to(value.dtype)
        result = torch.zeros_like(value)
        result[:, :2] = self.first(value)[:, :2]
        result[:, 2:] = self.second(value)[:, 2:]
        return result


def test_what_is_written_into_a_tensor_stays_and_each_role_has_its_own() -> None:
    model, example = Written(), {"value": torch.randn(3, 4)}
    expected = values(model, example)
    gm = ti_fx.capture(model, example)
    ti_fx.Pipeline(DuplicateTeacher())(gm)
    with torch.no_grad():
        model.first.weight.add_(1)  # the student alone: a teacher that wrote into its tensor would show
    changed = values(model, example)
    assert not torch.equal(changed, expected)
    assert torch.equal(values(gm, example), changed)
    ti_fx.Pipeline(Strip())(gm)
    assert torch.equal(values(gm, example), changed)


class Transposed(nn.Module):
    """A linear over an input that is not contiguous: torch's kernel depends on whether the weight is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, value: Tensor) -> Tensor:
        result: Tensor = self.linear(value.transpose(0, 1))
        return result


def test_a_frozen_teacher_computes_what_its_student_does() -> None:
    example = {"value": torch.randn(5, 7, 64)}
    gm = ti_fx.capture(Transposed(), example)
    ti_fx.Pipeline(DuplicateTeacher())(gm)
    student, teacher = (
        next(node for node in gm.graph.nodes if node.name == name) for name in ("linear", "linear_t")
    )
    gm.graph.output_node().args = ((student, teacher),)
    gm.recompile()
    left, right = gm(**example)
    assert torch.equal(left, right)


class WantsLabels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, value: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.training and labels is None:
            raise ValueError("labels are needed in training")
        result: Tensor = self.linear(value)
        return result


def test_a_model_that_only_evaluates_is_captured_and_the_report_says_so() -> None:
    model, example = WantsLabels(), {"value": torch.randn(3, 4)}
    gm = ti_fx.capture(model, example)
    assert torch.equal(values(gm, example), values(model, example))
    assert "labels are needed in training" in str(ti_fx.capture_report(gm).unchecked)


class Overlapping(nn.Module):
    """Overlapping windows over a transposed sequence, as Longformer cuts them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Tensor:
        hidden: Tensor = self.linear(value).transpose(0, 1)
        return hidden.as_strided((3, 5, 4, 4), (4, 12, 12, 1)) * 2


def test_overlapping_windows_are_read_in_the_order_of_memory(tmp_path: Path) -> None:
    model, example = Overlapping(), {"value": torch.randn(8, 3, 4)}
    gm = ti_fx.capture(model, example, dynamic="none")
    assert equal(model, gm, example)
    ti_fx.Pipeline(Ternarize(head=True), QuantizeActivations("float"), Pack())(gm)
    to_onnx(gm, tmp_path / "windows.onnx", example)  # compares ONNX Runtime with PyTorch


def test_images_keep_their_size_unless_asked_for() -> None:
    model = nn.Conv2d(3, 4, 3)
    example = {"input": torch.randn(2, 3, 8, 8)}
    assert ti_fx.capture_report(ti_fx.capture(model, example)).dims["input"] == ("batch", 3, 8, 8)
    every = ti_fx.capture_report(ti_fx.capture(model, example, dynamic="all")).dims["input"]
    assert [isinstance(size, str) for size in every] == [True, False, True, True]


@pytest.mark.slow
def test_experts_are_batched_products_in_the_graph_and_the_model_is_left_as_it_was() -> None:
    entry = build("mixtral")
    config: Any = entry.model.config
    before, chosen = copy.deepcopy(config.to_dict()), config._experts_implementation
    gm = ti_fx.capture(entry.model, entry.example)
    assert (config.to_dict(), config._experts_implementation) == (before, chosen)
    assert not any("grouped_mm" in str(node.target) for node in gm.graph.nodes)


class Caching(nn.Module):
    """Returns a cache whatever it is told, as a decoder does that hands it on to another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> BaseModelOutputWithPast:
        cache = DynamicCache()
        key, value = cache.update(self.linear(hidden)[:, None], hidden[:, None], 0)
        return BaseModelOutputWithPast(last_hidden_state=key + value, past_key_values=cache)


def test_a_cache_is_left_out_of_the_outputs() -> None:
    model, example = Caching(), {"hidden": torch.randn(2, 5, 8)}
    gm = ti_fx.capture(model, example)
    found, expected = gm(**example), model(**example)
    assert type(found) is BaseModelOutputWithPast
    assert list(found) == ["last_hidden_state"]
    assert torch.equal(found[0], expected[0])


class Scaled(nn.Module):
    """Multiplies by numbers in bfloat16, as decoders scale their embeddings: numpy has no such type."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("scale", torch.tensor(1.7, dtype=torch.bfloat16))
        self.scale: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.first(hidden) * torch.tensor(16**0.5, dtype=torch.bfloat16)
        result: Tensor = self.last(hidden * self.scale)
        return result


def test_numbers_in_bfloat16_are_exported(tmp_path: Path) -> None:
    example = {"hidden": torch.randn(2, 5, 16)}
    gm = ti_fx.capture(Scaled(), example)
    ti_fx.Pipeline(Ternarize(), QuantizeActivations(), Strip(), Pack())(gm)
    nodes = to_onnx(gm, tmp_path / "scaled.onnx", example).parity.nodes
    assert nodes is not None
    assert nodes.worst <= 1e-6


class Frames(nn.Module):
    """Gathers eight frames into one; the weight fixes the bins, and only algebra with the length's symbol says so."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8 * 4, 6)

    def forward(self, frames: Tensor) -> Tensor:
        batch, length, bins = frames.shape
        padded = nn.functional.pad(frames, (0, 0, 0, -length % 8))
        result: Tensor = self.project(padded.reshape(batch, padded.shape[1] // 8, 8 * bins))
        return result


def test_a_size_that_the_relations_of_sizes_fix_is_no_symbol() -> None:
    model, example = Frames(), {"frames": torch.randn(2, 24, 4)}
    gm = ti_fx.capture(model, example)
    report = ti_fx.capture_report(gm)
    assert report.dims["frames"] == ("batch", "sequence", 4)
    assert report.static["frames.2"] == "the model's code fixes frames.2 at 4"
    other = torch.randn(3, 32, 4)
    assert torch.equal(gm(frames=other), model(other))


def test_an_equality_without_a_value_at_a_size_does_not_hold_there() -> None:
    class Equality:
        def subs(self, sizes: dict[str, int]) -> bool:
            return 256 // (sizes["length"] // 8) == 64

    assert [size for size in (4, 8, 32, 64) if may_hold(Equality(), {"length": size})] == [32]
