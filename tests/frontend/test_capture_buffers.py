"""Buffers that move in training move in the captured graph as in the model, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from slow import slow
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import ti_fx
from ti_fx.errors import CaptureError
from ti_fx.export import to_onnx
from ti_fx.passes import DuplicateTeacher, Pack, QuantizeActivations, Strip, Ternarize

BATCHES = [torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


class Normalised(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 5), norm, nn.Linear(5, 5)

    def forward(self, value: Tensor) -> Tensor:
        result: Tensor = self.last(self.norm(self.first(value) * 3 + 1))
        return result


class Stopped(nn.BatchNorm1d):
    """Statistics are those of pretraining, in training, too."""

    def train(self, mode: bool = True) -> Stopped:
        return super().train(False)


def moved(module: nn.Module, name: str = "value") -> None:
    """Run a module in training and once in evaluation."""
    module.train()
    for batch in BATCHES:
        module(**{name: batch}).sum().backward()
    module.eval()
    with torch.no_grad():
        module(**{name: BATCHES[0]})


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(6, momentum=None),
        lambda: nn.BatchNorm1d(6),
        lambda: nn.BatchNorm1d(6, momentum=0.0),
        lambda: nn.BatchNorm1d(6, momentum=None, affine=False),
        lambda: nn.BatchNorm1d(6, track_running_stats=False),
        lambda: nn.SyncBatchNorm(6, momentum=None),
        lambda: Stopped(6),
        lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm1d(6),
        lambda: nn.Sequential(nn.BatchNorm1d(6), spectral_norm(nn.Linear(5, 5))),
        lambda: nn.Sequential(*[nn.BatchNorm1d(6, momentum=None)] * 2),
    ],
)
def test_norms_move_their_statistics_as_in_the_model(norm: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = Normalised(norm())
    source = copy.deepcopy(model)
    gm = ti_fx.capture(model, {"value": BATCHES[0]})
    same_buffers(model, source)  # capture moves nothing
    moved(source)
    moved(gm)
    same_buffers(model, source)
    for batch in BATCHES:
        with torch.no_grad():
            torch.testing.assert_close(gm(value=batch), source(batch), rtol=1e-6, atol=1e-6)


def same_buffers(model: nn.Module, source: nn.Module) -> None:
    for name, value in source.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), value, rtol=1e-6, atol=1e-6, msg=name)
        assert model.get_buffer(name).requires_grad == value.requires_grad


def test_the_count_of_batches_is_the_models_own_and_the_teacher_stands_still(tmp_path: Path) -> None:
    model = Normalised(nn.BatchNorm1d(6, momentum=None))
    gm = ti_fx.capture(model, {"value": BATCHES[0]})
    ti_fx.Pipeline(DuplicateTeacher(), Ternarize(), QuantizeActivations())(gm)
    before = {name: value.clone() for name, value in gm.get_submodule("teacher").named_parameters()}
    moved(gm)
    assert gm.state_dict()["norm.num_batches_tracked"] == model.norm.num_batches_tracked == len(BATCHES)
    for name, value in gm.get_submodule("teacher").named_parameters():
        assert torch.equal(value, before[name])
    ti_fx.Pipeline(Strip(), Pack())(gm)
    kept = {name: value.clone() for name, value in model.named_buffers()}
    to_onnx(gm, tmp_path / "norm.onnx", {"value": BATCHES[0]})
    assert all(torch.equal(value, kept[name]) for name, value in model.named_buffers())


class Writes(nn.Module):
    """Buffers that forward writes into; ``write`` does it."""

    def __init__(self, write: Callable[[Writes, Tensor], None], always: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 5)
        self.write, self.always = write, always
        self.register_buffer("center", torch.zeros(5))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("table", torch.zeros(3, 5))
        self.center: Tensor
        self.count: Tensor
        self.table: Tensor

    def forward(self, value: Tensor) -> Tensor:
        value = self.first(value)
        if self.training or self.always:
            self.write(self, value)
        result: Tensor = self.last(value - self.center + self.table.sum(0))
        return result


@torch.no_grad()
def average(module: Writes, value: Tensor) -> None:
    module.center.mul_(0.9).add_(value.mean((0, 1)), alpha=0.1)


def detached_average(module: Writes, value: Tensor) -> None:
    module.center.copy_(module.center * 0.9 + value.detach().mean((0, 1)) * 0.1)


def counted(module: Writes, value: Tensor) -> None:
    module.count += 1


def replaced(module: Writes, value: Tensor) -> None:
    module.count = module.count + 1
    module.center = torch.maximum(module.center, value.detach().amax((0, 1)))


def part(module: Writes, value: Tensor) -> None:
    module.table[1] = value.detach()[0, 0]
    module.table[2:].lerp_(value.detach()[0, :1], 0.5)


@torch.no_grad()
def by_keyword(module: Writes, value: Tensor) -> None:
    torch.add(module.center * 0.9, value.mean((0, 1)), alpha=0.1, out=module.center)


@pytest.mark.parametrize("write", [average, part, *slow(by_keyword, detached_average, counted, replaced)])
def test_what_training_writes_is_written_in_training_alone(
    write: Callable[[Writes, Tensor], None], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Writes(write)
    source = copy.deepcopy(model)
    objects = dict(model.named_buffers())
    gm = ti_fx.capture(model, {"value": BATCHES[0]})
    same_buffers(model, source)
    assert all(value is objects[name] for name, value in model.named_buffers())
    moved(source)
    moved(gm)
    assert any(bool(value.any()) for value in model.buffers())
    same_buffers(model, source)
    with torch.no_grad():
        torch.testing.assert_close(gm(value=BATCHES[1]), source(BATCHES[1]))
    ti_fx.Pipeline(DuplicateTeacher(), Strip())(gm)
    ti_fx.Pipeline(Ternarize(head=True), QuantizeActivations("float"), Pack())(gm)
    to_onnx(gm, tmp_path / "written.onnx", {"value": BATCHES[0]})
    same_buffers(model, source)


def test_a_counter_of_all_calls_counts_them_and_no_file_has_it(tmp_path: Path) -> None:
    model = Writes(counted, always=True)
    gm = ti_fx.capture(model, {"value": BATCHES[0]})
    moved(gm)
    assert model.count == len(BATCHES) + 1
    ti_fx.Pipeline(DuplicateTeacher(), Strip(), Ternarize(head=True), QuantizeActivations(), Pack())(gm)
    to_onnx(gm, tmp_path / "counter.onnx", {"value": BATCHES[0]})
    assert model.count == len(BATCHES) + 1


def test_outputs_that_depend_on_what_evaluation_writes_are_refused() -> None:
    said = r"buffer center in evaluation \(test_capture_buffers\.py:\d+\), and its outputs depend on it"
    with pytest.raises(CaptureError, match=said):
        ti_fx.capture(Writes(average, always=True), {"value": BATCHES[0]})
    with pytest.raises(CaptureError, match=r"buffer table in evaluation \(test_capture_buffers\.py:\d+\)"):
        ti_fx.capture(Writes(part, always=True), {"value": BATCHES[0]})


def test_a_parameter_that_forward_writes_into_is_refused() -> None:
    @torch.no_grad()
    def clamp(module: Writes, value: Tensor) -> None:
        module.last.weight.clamp_(-1, 1)

    said = r"writes into the parameter last\.weight \(test_capture_buffers\.py:\d+\)"
    with pytest.raises(CaptureError, match=said):
        ti_fx.capture(Writes(clamp), {"value": BATCHES[0]})
