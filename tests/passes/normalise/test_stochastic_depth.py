"""Branches that are dropped at random in training: the graph drops the same ones, and none in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import BeitConfig, BeitForImageClassification

import ti_fx
from ti_fx.errors import CaptureError
from ti_fx.export import to_onnx
from ti_fx.ir.leaves import DropPath

Drop = Callable[[Tensor], Tensor]
KEEP = 0.6


def as_transformers(value: Tensor) -> Tensor:
    drawn = torch.rand((value.shape[0],) + (1,) * (value.dim() - 1), dtype=value.dtype, device=value.device)
    return value.div(KEEP) * torch.floor(drawn + KEEP)


def as_older_transformers(value: Tensor) -> Tensor:
    drawn = KEEP + torch.rand((value.shape[0], 1, 1), dtype=value.dtype, device=value.device)
    drawn.floor_()
    return drawn * value.div(KEEP)


def as_timm(value: Tensor) -> Tensor:
    drawn = value.new_empty((value.shape[0], 1, 1)).bernoulli_(KEEP)
    return value * drawn.div_(KEEP)


def as_torchvision_by_batch(value: Tensor) -> Tensor:
    noise = torch.empty([1] * value.dim(), dtype=value.dtype, device=value.device).bernoulli_(KEEP)
    noise.div_(KEEP)
    return value * noise


class Residual(nn.Module):
    """A branch that is dropped in training."""

    def __init__(self, drop: Drop) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.drop = nn.Linear(8, 8), drop

    def forward(self, x: Tensor) -> Tensor:
        branch = self.layer(x)
        return x + (self.drop(branch) if self.training else branch)


def leaves(gm: GraphModule) -> list[DropPath]:
    return [module for module in gm.modules() if isinstance(module, DropPath)]


@pytest.mark.parametrize(
    "drop",
    [as_transformers, as_older_transformers, as_timm, as_torchvision_by_batch],
    ids=lambda f: f.__name__,
)
def test_the_same_rows_are_dropped_as_in_the_model(drop: Drop) -> None:
    model = Residual(drop)
    gm = ti_fx.capture(model, {"x": torch.randn(3, 4, 8)})
    (leaf,) = leaves(gm)
    assert leaf.p == pytest.approx(1 - KEEP)
    assert not any("rand" in str(node.target) or "bernoulli" in str(node.target) for node in gm.graph.nodes)
    x = torch.randn(40, 5, 8)
    for training in (True, False):
        model.train(training)
        gm.train(training)
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        found = gm(x=x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        kept = (found != x).any(dim=(1, 2))
        if training and leaf.rows:
            assert 0 < int(kept.sum()) < len(x)
    assert kept.all()


def noise_of_another_form(value: Tensor) -> Tensor:
    return value * torch.randn(value.shape[0], 1, 1)


def not_divided(value: Tensor) -> Tensor:
    return value * value.new_empty((value.shape[0], 1, 1)).bernoulli_(KEEP)


def divided_by_another_number(value: Tensor) -> Tensor:
    return value * value.new_empty((value.shape[0], 1, 1)).bernoulli_(KEEP).div_(0.5)


@pytest.mark.parametrize("drop", [noise_of_another_form, not_divided, divided_by_another_number])
def test_other_noise_in_training_is_refused(drop: Drop) -> None:
    with pytest.raises(CaptureError, match="in eval mode"):
        ti_fx.capture(Residual(drop), {"x": torch.randn(3, 4, 8)})


@pytest.mark.slow
def test_a_vision_model_that_drops_paths_goes_all_the_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BeitConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        drop_path_rate=0.3,
    )
    model = BeitForImageClassification(config)
    example = {"pixel_values": torch.randn(2, 3, 16, 16)}
    gm = ti_fx.capture(model, example)
    assert len(leaves(gm)) == 2  # the first layer's rate is 0
    assert [site.layer for site in ti_fx.find_attention(gm)] == [0, 1]
    ti_fx.Recipe.preset("ti-g").prepare(gm)
    assert sum("DropPath" in line for line in ti_fx.dump(gm).splitlines()) == 2  # the teacher drops nothing
    gm.train()
    gm(**example)["loss"].backward()
    ti_fx.Pipeline(ti_fx.passes.Strip(), ti_fx.passes.Pack())(gm)
    assert to_onnx(gm.eval(), tmp_path / "beit.onnx", example).parity.differences
