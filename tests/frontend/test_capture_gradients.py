"""The captured graph trains what the model trains: regions without gradients, and gradients of a model's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import ti_fx
from ti_fx.errors import CaptureError, InputError
from ti_fx.export import Runtime, to_onnx
from ti_fx.passes import DecomposeAttention, DuplicateTeacher, Pack, QuantizeActivations, Ternarize

EXAMPLE = {"value": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}


class Layers(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.function = function

    def forward(self, value: Tensor) -> Tensor:
        return self.function(value, self.a, self.b, self.c)


def frozen_front(value: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
    with torch.no_grad():
        hidden = b(a(value).relu())
    result: Tensor = c(hidden) + hidden
    return result


def inference(value: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
    with torch.inference_mode():
        scale = a(value).sum()
    return c(value) * float(2) + b(value) + scale.clone() * 0.5


def switched(value: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    hidden = a(value)
    torch.set_grad_enabled(before)
    return b(hidden) + c(value).detach()


def trained_within(value: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
    with torch.no_grad():
        hidden = a(value)
        with torch.enable_grad():
            inner = b(hidden) * hidden
        outer = inner * 2 + hidden
    result: Tensor = c(outer) + inner
    return result


def shared(value: Tensor, a: nn.Module, b: nn.Module, c: nn.Module) -> Tensor:
    @torch.no_grad()
    def target(x: Tensor) -> Tensor:
        first, second = a(x).chunk(2, -1)
        return torch.cat([second, first], -1)

    return (a(value) - target(value)).pow(2) + c(target(b(value)))


@pytest.mark.parametrize("function", [frozen_front, inference, switched, trained_within, shared])
@pytest.mark.parametrize("no_grad", [False, True])
def test_what_the_model_never_trains_gets_no_gradient(function: Callable[..., Tensor], no_grad: bool) -> None:
    torch.manual_seed(0)
    model = Layers(function)
    with torch.set_grad_enabled(not no_grad):
        gm = ti_fx.capture(model, EXAMPLE)
    expected, found = (gradients(model, module) for module in (model, gm))
    assert {name for name, value in expected.items() if value is None}
    for name, value in expected.items():
        other = found[name]
        assert (value is None) == (other is None), name
        if value is not None:
            torch.testing.assert_close(other, value)
    ti_fx.Pipeline(DuplicateTeacher())(gm)
    assert {name for name, value in gradients(model, gm).items() if value is None} == {
        name for name, value in expected.items() if value is None
    }


def gradients(model: nn.Module, module: nn.Module) -> dict[str, Tensor | None]:
    model.zero_grad()
    module.train()
    module(**EXAMPLE).pow(2).sum().backward()
    return {
        name: None if value.grad is None else value.grad.clone() for name, value in model.named_parameters()
    }


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.round()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


def test_a_gradient_of_the_models_own_is_refused() -> None:
    with pytest.raises(
        CaptureError, match=r"gradient.*a\.weight|a\.weight gets a gradient in the model alone"
    ):
        ti_fx.capture(Layers(lambda value, a, b, c: c(Doubled.apply(b(a(value))))), EXAMPLE)


class BySize(nn.Module):
    """Decides by the length in a way that the trace does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 4)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.table(ids)
        return hidden * (2.0 if hidden.detach().shape[1] in (8, 16, 32) else 3.0)


def test_a_size_at_which_the_model_computes_something_else_is_refused_or_fixed() -> None:
    model = BySize()
    example = {"ids": torch.arange(16).view(2, 8)}
    gm = ti_fx.capture(model, example)
    for length in (5, 7, 8, 9, 13):
        ids = torch.arange(3 * length).view(3, length) % 20
        try:
            found = gm(ids=ids)
        except InputError:
            continue
        assert torch.equal(found, model(ids))


class Masked(nn.Module):
    """Attention under a mask of its own, whose rows may hide every key."""

    def __init__(self, groups: int = 1, scale: float | None = None) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(16, 16), nn.Linear(16, 2 * 16 // groups), nn.Linear(16, 16)
        self.groups, self.scale = groups, scale

    def forward(self, value: Tensor, mask: Tensor) -> Tensor:
        heads, own = (value.shape[0], value.shape[1], -1, 4), self.groups > 1
        query = self.q(value).view(heads).transpose(1, 2)
        key, other = (part.view(heads).transpose(1, 2) for part in self.kv(value).chunk(2, -1))
        context = scaled_dot_product_attention(query, key, other, mask, scale=self.scale, enable_gqa=own)
        result: Tensor = self.o(context.transpose(1, 2).flatten(2))
        return result


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (2, 1, 1, 5), (5, 5)])
@pytest.mark.parametrize("kind", ["bool", "inf"])
def test_a_query_whose_mask_hides_every_key_has_a_context_of_zero(
    groups: int, shape: tuple[int, ...], kind: str
) -> None:
    torch.manual_seed(0)
    keep = torch.rand(shape) < 0.6
    keep[..., 0] = True
    (keep[1] if len(shape) == 4 else keep[2])[...] = False  # a row of padding alone, or one query
    mask = keep if kind == "bool" else torch.zeros(shape).masked_fill(~keep, float("-inf"))
    model, example = Masked(groups), {"value": torch.randn(2, 5, 16), "mask": mask}
    gm = ti_fx.capture(model, example)
    ti_fx.Pipeline(DecomposeAttention())(gm)
    expected = model(**example)
    torch.testing.assert_close(gm(**example), expected)
    found = []
    for module in (model, gm):
        model.zero_grad()
        module(**example).pow(2).sum().backward()
        found.append([value.grad.clone() for value in model.parameters() if value.grad is not None])
    torch.testing.assert_close(found[0], found[1])


def test_an_exported_file_gives_zero_there_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    keep = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    keep[1] = False
    model, example = Masked(), {"value": torch.randn(2, 5, 16), "mask": keep}
    gm = ti_fx.capture(model, example)
    ti_fx.Pipeline(DecomposeAttention(), Ternarize(), QuantizeActivations(), Pack())(gm)
    to_onnx(gm, tmp_path / "masked.onnx", example)
    (found,) = Runtime(tmp_path / "masked.onnx")(example).values()
    torch.testing.assert_close(torch.as_tensor(found)[1], model.o.bias.detach().expand(5, 16))
