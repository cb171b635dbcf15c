"""Golden texts: the difference each lowering pass makes to a small graph, and that it makes none a second time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from lowering_models import Block, Rotated, as_packed, block_example, packed_small, rotated_example
from torch import Tensor, nn
from torch.fx import GraphModule

import ti_fx
from ti_fx.ir.pipeline import Pass, name_of
from ti_fx.passes.lower import (
    LOWER,
    ChooseLayouts,
    DequantiseWeights,
    DropDropout,
    DropIdentities,
    DropSqueezes,
    ForgetRoles,
    FuseAttention,
    FuseRmsNorms,
    FuseRotary,
    KeepSumsApart,
    LookUpPacked,
    MarkHalves,
    MultiplyBlocks,
    MultiplyIntegers,
    RequireIds,
    RoundActivations,
    SplitComplex,
    WriteCoreOperators,
    WriteFixedSizes,
    WriteForExporter,
)


class Squeezed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(1).relu()


class Sliced(nn.Module):
    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return table[max(0, 1 - 2 * x.shape[1]) :] + x.sum()


class Identities(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float32)[0:].relu()


class Odd(nn.Module):
    """Everything that the exporter refuses or gets wrong."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        place = torch.searchsorted(ends, x)
        number = torch.erfinv(torch.tensor(0.5))
        first, last = torch.cat((x, x), 1).chunk(2, 1)
        sums = torch.add(2.0, first + last, alpha=3).sum() + x.sum() * number
        return 1 - place + sums + (x.mean(1, keepdim=True) + 1e-9)


class Composite(nn.Module):
    """Operators that are made of others."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x * torch.nn.functional.adaptive_avg_pool1d(x, 1)
        rows += x.diff(dim=1, prepend=x[:, :1])
        low, high = x > 0, x < 1
        return torch.max(rows, x) * (low & high | ~low).to(torch.float32)


def block() -> GraphModule:
    return as_packed(Block(), block_example())


X = torch.arange(6.0).view(2, 3)
TABLE = torch.arange(16.0).view(4, 4)


@dataclass(frozen=True)
class Case:
    """A graph, the passes that run first, and the one whose difference is compared."""

    make: Callable[[], GraphModule]
    one: Pass
    before: tuple[Pass, ...] = field(default=())


CASES = (
    Case(packed_small, DropDropout()),
    Case(lambda: as_packed(Squeezed(), {"x": X}), DropSqueezes()),
    Case(lambda: as_packed(Sliced(), {"x": X, "table": TABLE}, dynamic="all"), WriteFixedSizes()),
    Case(lambda: as_packed(Rotated(), rotated_example()), SplitComplex()),
    Case(packed_small, ChooseLayouts()),
    Case(packed_small, RequireIds()),
    Case(packed_small, LookUpPacked(), (ChooseLayouts(),)),
    Case(lambda: packed_small("nbits2-32"), MultiplyBlocks(), (ChooseLayouts(),)),
    Case(packed_small, MultiplyIntegers(), (ChooseLayouts(),)),
    Case(packed_small, RoundActivations()),
    Case(lambda: packed_small("float"), DequantiseWeights(), (ChooseLayouts(), LookUpPacked())),
    Case(lambda: packed_small(kept="float16"), MarkHalves()),
    Case(lambda: as_packed(Identities(), {"x": X}), DropIdentities()),
    Case(block, FuseRmsNorms()),
    Case(block, FuseRotary(), (DropIdentities(),)),
    Case(block, FuseAttention(), (DropIdentities(), FuseRotary())),
    Case(packed_small, KeepSumsApart(), (DropDropout(),)),
    Case(lambda: as_packed(Odd(), {"x": TABLE, "ends": X[0]}, dynamic="all"), WriteForExporter()),
    Case(lambda: as_packed(Composite(), {"x": TABLE}, dynamic="all"), WriteCoreOperators()),
    Case(lambda: as_packed(Squeezed(), {"x": X}), ForgetRoles()),
)


def test_every_pass_of_the_lowering_has_a_golden_text() -> None:
    assert [name_of(case.one) for case in CASES] == [name_of(one) for one in LOWER.passes]


@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(case.one))
def test_the_difference_a_lowering_pass_makes(case: Case, golden: Callable[[str, str], None]) -> None:
    gm = case.make()
    ti_fx.Pipeline(*case.before)(gm)
    old = ti_fx.dump(gm)
    if isinstance(case.one, ForgetRoles):  # a packed graph has roles, so it is refused outside LOWER
        case.one.apply(gm)
    else:
        ti_fx.Pipeline(case.one)(gm)
    golden(f"lower_{name_of(case.one).replace('-', '_')}", ti_fx.diff(old, gm))
    once = ti_fx.dump(gm)
    case.one.apply(gm)
    assert ti_fx.dump(gm) == once
