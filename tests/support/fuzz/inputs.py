"""Inputs of a case at any sizes, among them the values at which its module decides otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from fuzz.case import VOCABULARY, WIDTH, Case


def inputs_of(case: Case, batch: int, length: int, seed: int = 0, *, odd: bool = False) -> dict[str, Tensor]:
    """Return inputs by name.

    Args:
        case: whose module reads them.
        batch, length: their sizes; a memory and prompts have others of their own.
        seed: of the values.
        odd: whether they hold what a module that decides by values decides otherwise by.
    """
    generator = torch.Generator().manual_seed(1000 + case.seed + seed)
    found: dict[str, Tensor] = {}
    if case.ids != "none":
        ids = torch.randint(4, VOCABULARY, (batch, length), generator=generator)
        if odd:
            ids[-1, length // 2] = 3 if case.extra == "by-value" else 1
        found["ids"] = ids.to(getattr(torch, case.ids))
    else:
        features = torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)
        features = features.clamp(-2, 2).to(case.torch_dtype)
        if odd:
            features[-1, length // 2] = 3.0
        found["features"] = features
    if case.mask != "none":
        kept = torch.randint(1, length + 1, (batch,), generator=generator)
        kept[0] = length
        if case.empty_rows and batch > 1:
            kept[-1] = 0
        found["mask"] = _mask(case, torch.arange(length)[None] < kept[:, None])
    if case.memory:
        found["memory"] = torch.randn(
            batch, length // 2 + 3, WIDTH, generator=generator, dtype=torch.float64
        ).to(case.torch_dtype)
    if case.prompts:
        found["prompts"] = torch.randn(batch + 2, 6, generator=generator, dtype=torch.float64).to(
            case.torch_dtype
        )
    return found


def _mask(case: Case, keep: Tensor) -> Tensor:
    if case.mask == "bool":
        return keep
    if case.mask == "ignore":
        return ~keep
    if case.mask == "int":
        return keep.to(torch.int64)
    if case.mask == "float":
        return keep.to(case.torch_dtype)
    if case.mask == "bool4":
        return keep[:, None, None, :]
    return torch.where(keep, 0.0, -10000.0).to(case.torch_dtype)[:, None, None, :]
