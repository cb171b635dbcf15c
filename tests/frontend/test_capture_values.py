"""Models whose Python reads values: one graph follows the example, and refuses inputs that decide otherwise."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx import numerics
from ti_fx.errors import CaptureError, InputError, RandomnessError
from ti_fx.export import to_onnx
from ti_fx.frontend.checks import positions
from ti_fx.ir.roles import is_student
from ti_fx.passes import Distill, DuplicateTeacher, Pack, QuantizeActivations, Strip, Ternarize


def values(model: nn.Module, example: dict[str, Tensor], training: bool = False) -> Tensor:
    model.train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        result: Tensor = model(**example)
    return result


def checks(gm: GraphModule) -> list[torch.fx.Node]:
    return [node for node in gm.graph.nodes if "_assert_async" in str(node.target)]


class Padded(nn.Module):
    """Masks padding only if there is any, and clamps only what overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.linear(self.table(ids))
        padding = ids == 0
        if padding.any():
            hidden = hidden.masked_fill(padding[..., None], 0)
        if not torch.isfinite(hidden).all():
            hidden = hidden.clamp(-1e4, 1e4)
        result: Tensor = self.head(torch.relu(hidden))
        return result


IDS = {"ids": torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]])}
OTHER = {"ids": torch.tensor([[3, 0, 5], [6, 7, 8], [1, 2, 3]])}
UNPADDED = {"ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}


def test_a_decision_by_values_is_followed_and_checked() -> None:
    model = Padded()
    gm = ti_fx.capture(model, IDS)
    for training in (False, True):
        assert torch.equal(values(gm, OTHER, training), values(model, OTHER, training))
    for graph in (gm, ti_fx.fork(gm)):
        with pytest.raises(
            RuntimeError, match=r"test_capture_values\.py:\d+, which read True .*capture with an"
        ):
            graph(**UNPADDED)
    with torch.no_grad():
        model.linear.bias.fill_(float("inf"))
    with pytest.raises(RuntimeError, match=r"which read True on the captured example"):
        gm(**IDS)
    said = ti_fx.capture_report(gm).followed
    assert len(said) == 2
    assert all("on the example: the graph follows that and refuses" in line for line in said)
    assert said[0] in str(ti_fx.capture_report(gm))


def test_checks_go_with_the_student_through_every_pass_and_into_a_file(tmp_path: Path) -> None:
    gm = ti_fx.capture(Padded(), IDS)
    ti_fx.Pipeline(
        DuplicateTeacher(),
        Ternarize(head=True),
        QuantizeActivations("float"),
        Distill(layer_outputs=0, scores=0, attention_outputs=0),
    )(gm)
    ti_fx.verify(gm)
    # of the two, one depends on the inputs alone and is shared, and one has a twin for the teacher
    assert len(checks(gm)) == 3
    assert sum(is_student(node) for node in checks(gm)) == 1
    gm(**OTHER)["loss"].backward()
    with pytest.raises(RuntimeError, match="decide otherwise"):
        gm(**UNPADDED)
    ti_fx.Pipeline(Strip(), Pack())(gm)
    assert len(checks(gm)) == 2
    with pytest.raises(RuntimeError, match="decide otherwise"):
        gm(**UNPADDED)
    to_onnx(gm, tmp_path / "padded.onnx", IDS)


@pytest.mark.slow
def test_checks_hold_in_a_compiled_training_step() -> None:
    gm = ti_fx.capture(Padded(), IDS)
    ti_fx.Pipeline(
        DuplicateTeacher(), Ternarize(head=True), Distill(layer_outputs=0, scores=0, attention_outputs=0)
    )(gm)
    compiled = torch.compile(gm, fullgraph=True, dynamic=True, backend="aot_eager")
    for example in (IDS, OTHER):
        compiled(**example)["loss"].backward()
    with pytest.raises(RuntimeError) as caught:
        compiled(**UNPADDED)
    error: BaseException | None = caught.value
    said = []
    while error is not None:  # torch wraps what a compiled graph raises
        said.append(str(error))
        error = error.__context__
    assert any("decide otherwise" in text for text in said)


def test_without_values_there_is_nothing_to_follow() -> None:
    with torch.device("meta"):
        model = Padded()
    with pytest.raises(InputError, match="meta tensors"):
        ti_fx.capture(model, IDS)


class WeightsDecide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Tensor:
        result: Tensor = self.linear(value)
        return result if result.sum() > 0 else -result


def test_what_the_weights_decide_is_refused_because_training_changes_it() -> None:
    with pytest.raises(CaptureError, match=r"test_capture_values\.py:\d+"):
        ti_fx.capture(WeightsDecide(), {"value": torch.randn(3, 4)})


class Entropy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Tensor:
        distribution: Any = torch.distributions.Categorical(logits=self.linear(value))
        result: Tensor = distribution.entropy()
        return result


def test_distributions_are_captured_without_their_look_at_values() -> None:
    model, example = Entropy(), {"value": torch.randn(3, 4)}
    before = torch.distributions.Distribution._validate_args
    gm = ti_fx.capture(model, example)
    assert torch.distributions.Distribution._validate_args == before
    assert not checks(gm)
    other = {"value": torch.randn(5, 4)}
    assert torch.equal(values(gm, other), values(model, other))


class Sizes(nn.Module):
    """Computes sizes with tensors: of Python numbers, and of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("stride", torch.tensor(2))
        self.register_buffer("scale", torch.ones(4))
        self.stride: Tensor
        self.scale: Tensor

    def forward(self, value: Tensor) -> Tensor:
        count: Any = torch.div(value.size(1), 4, rounding_mode="trunc")
        parts = self.linear(value).view(value.size(0), count, -1, 4).sum(2) * self.scale
        padding = int(self.stride * 3 - count)
        return nn.functional.pad(parts, (0, 0, 0, padding)).view(value.size(0), -1, int(self.stride), 4)


def test_sizes_that_tensors_of_constants_give_are_fixed_with_the_reason() -> None:
    model, example = Sizes(), {"value": torch.randn(3, 16, 4)}
    gm = ti_fx.capture(model, example)
    assert torch.equal(values(gm, example), values(model, example))
    assert list(model.state_dict()) == ["stride", "scale", "linear.weight", "linear.bias"]
    assert "value.1" in ti_fx.capture_report(gm).static
    ti_fx.Pipeline(DuplicateTeacher())(gm)


class Images(nn.Module):
    """Takes sizes of images as tensors: bounds of slices, sizes of views and of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        cut = [image[: size[0], : size[1]] for image, size in zip(images, sizes, strict=True)]
        areas = [height * width for height, width in sizes]
        flat = self.linear(torch.cat([one.reshape(-1, 3) for one in cut]))
        parts = []
        for part, (height, width) in zip(flat.split(areas), sizes, strict=True):
            parts.append(part.view(height, width, 3).mean(0))
        return torch.cat(parts)


def test_tensors_as_sizes_make_their_input_a_constant() -> None:
    example = {"images": torch.randn(2, 4, 5, 3), "sizes": torch.tensor([[4, 2], [3, 5]])}
    model = Images()
    gm = ti_fx.capture(model, example)
    assert torch.equal(values(gm, example), values(model, example))
    assert "constants of the graph" in ti_fx.capture_report(gm).static["sizes.0"]


class Experts(nn.Module):
    """Runs the experts that some token goes to, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 6)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, value: Tensor) -> Tensor:
        chosen = self.router(value).argmax(-1)
        result = torch.zeros_like(value)
        mask = nn.functional.one_hot(chosen, 6).T
        for expert in (mask.sum(-1) > 0).nonzero():
            (places,) = torch.where(mask[expert[0]])
            if places.numel() == 0:
                continue
            result.index_add_(0, places, self.experts[int(expert[0])](value[places]))
        return result


def test_a_loop_over_the_experts_that_are_hit_runs_over_all_of_them() -> None:
    torch.manual_seed(0)
    model, example = Experts(), {"value": torch.randn(3, 8)}
    gm = ti_fx.capture(model, example)
    for tokens in (2, 40):  # other tokens hit other experts
        other = {"value": torch.randn(tokens, 8)}
        assert torch.equal(values(gm, other), values(model, other))
    (said,) = ti_fx.capture_report(gm).followed
    assert "runs over all rows that its mask may hit" in said
    ti_fx.Pipeline(DuplicateTeacher(), Ternarize(head=True), QuantizeActivations("int8-tensor"))(gm)
    gm(**example).sum().backward()  # experts that get nothing quantise nothing


@pytest.mark.parametrize("quantise", [numerics.int8_tensor, numerics.int8_token, numerics.int8_reference])
def test_nothing_is_quantised_to_nothing(quantise: Any) -> None:
    empty = torch.zeros(0, 4, requires_grad=True)
    result = quantise(empty)
    result.sum().backward()
    assert result.shape == (0, 4)
    assert empty.grad is not None


class Placeholders(nn.Module):
    """Compares in Python how many places a mask has with how many features there are."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(8, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor, features: Tensor) -> Tensor:
        hidden: Tensor = self.table(ids)
        mask = (ids == 7)[..., None].expand_as(hidden)
        if hidden[mask].numel() != features.numel():
            raise ValueError("as many placeholders as features are needed")
        result: Tensor = self.linear(hidden.masked_scatter(mask, features))
        return result


def test_how_many_places_a_mask_has_is_followed_and_checked() -> None:
    model = Placeholders()
    example = {"ids": torch.tensor([[7, 1, 2], [3, 7, 4]]), "features": torch.randn(2, 4)}
    gm = ti_fx.capture(model, example)
    moved = {**example, "ids": torch.tensor([[1, 7, 7], [3, 5, 4]])}
    assert torch.equal(values(gm, moved), values(model, moved))
    with pytest.raises(RuntimeError, match="which read 8"):
        gm(**{**example, "ids": torch.tensor([[1, 7, 7], [3, 7, 4]])})


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_places_of_a_mask_are_those_of_nonzero(share: float) -> None:
    torch.manual_seed(0)
    mask = torch.rand(3, 4, 5) < share
    expected = mask.nonzero(as_tuple=True)
    for found, wanted in zip(positions(mask, int(mask.sum())), expected, strict=True):
        assert torch.equal(found, wanted)


class LayerDrop(nn.Module):
    def __init__(self, probability: float) -> None:
        super().__init__()
        self.linear, self.probability = nn.Linear(4, 4), probability

    def forward(self, value: Tensor) -> Tensor:
        drawn = random.uniform(0, 1)
        return value if self.training and drawn < self.probability else self.linear(value)


def test_a_number_drawn_in_python_that_never_matters_is_none() -> None:
    model, example = LayerDrop(0.0), {"value": torch.randn(3, 4)}
    assert torch.equal(values(ti_fx.capture(model, example), example), values(model, example))
    with pytest.raises(RandomnessError, match=r"decides by a random number .*test_capture_values\.py:\d+"):
        ti_fx.capture(LayerDrop(0.5), example)


class AuxiliaryOutputs(nn.Module):
    """Returns more in training, as detectors do for losses of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, value: Tensor) -> tuple[Tensor, ...]:
        result = self.dropout(self.linear(value))
        return (result, result * 2) if self.training else (result,)


def test_a_model_that_returns_more_in_training_is_captured_as_it_evaluates_and_said_so() -> None:
    model, example = AuxiliaryOutputs(), {"value": torch.randn(3, 4)}
    gm = ti_fx.capture(model, example)
    (result,) = gm.eval()(**example)
    assert torch.equal(result, model.eval()(**example)[0])
    assert (gm.train()(**example)[0] == 0).any()
    assert "returns other outputs than in eval mode" in str(ti_fx.capture_report(gm).unchecked)


class NothingMasked(nn.Module):
    """Does something else where a mask selects nothing; no loop, so that is no case of computing on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, value: Tensor, mask: Tensor) -> Tensor:
        chosen = value[mask > 0]
        result: Tensor = self.linear(value)
        return result + 1 if chosen.shape[0] == 0 else result


def test_whether_a_mask_selects_anything_is_no_guess() -> None:
    model, example = NothingMasked(), {"value": torch.randn(3, 4), "mask": torch.tensor([1, 0, 1])}
    gm = ti_fx.capture(model, example)
    assert torch.equal(values(gm, example), values(model, example))
    with pytest.raises((RuntimeError, ti_fx.errors.InputError), match=r"which read 2|steers Python"):
        gm(value=example["value"], mask=torch.tensor([0, 0, 0]))
