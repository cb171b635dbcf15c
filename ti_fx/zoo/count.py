"""Attention blocks are counted while a model runs, and one block's map can be replaced there (``ti_fx.zoo.watch``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ti_fx.example_inputs.makers import run
from ti_fx.numerics.closeness import relative
from ti_fx.zoo.models import Entry
from ti_fx.zoo.watch import AttentionCall, Change, Watch, watched


def attention_calls(model: nn.Module, example: Mapping[str, Tensor]) -> list[AttentionCall]:
    """Return every softmax of a product of two activations in one forward, in the order in which they run."""
    watch = Watch(model)
    with watched(watch):
        used = watch.used(run(model, example))
    return [replace(call, used=bool(used >> call.index & 1)) for call in watch.calls]


@contextmanager
def replaced(model: nn.Module, index: int, change: Change) -> Iterator[None]:
    """Within the block, each forward's attention call of that index has ``change(map)`` for its map.

    Args:
        model: runs in the block, once.
        index: ``AttentionCall.index``.
        change: takes the map and returns a tensor of the same shape.
    """
    with watched(Watch(model, index, change)):
        yield


def uniform(attention_map: Tensor) -> Tensor:
    """Return the same weight for every position that the map attends to."""
    attended = (attention_map > 0).to(attention_map.dtype)
    return attended / attended.sum(-1, keepdim=True).clamp(min=1)


def uniform_effect(entry: Entry) -> list[float]:
    """Return, for each attention block, how far a uniform map moves the outputs, as a part of their norm.

    Blocks that can't make a difference are left out: those that no output depends on, and moot ones.
    """
    outputs = _flat(run(entry.model, entry.example))
    effects = []
    for call in attention_calls(entry.model, entry.example):
        if call.has_value and call.used and not call.moot:
            with replaced(entry.model, call.index, uniform):
                moved = _flat(run(entry.model, entry.example))
            effects.append(_moved(outputs, moved))
    return effects


def _moved(outputs: list[Tensor], others: list[Tensor]) -> float:
    """Return the largest relative change among the outputs."""
    changes = []
    for output, other in zip(outputs, others, strict=True):
        if output.shape != other.shape:
            return 1.0  # what decides the length has changed
        if output.numel():
            finite = torch.isfinite(output) & torch.isfinite(other) & (output.abs() < 1e30)
            changes.append(relative(other[finite], output[finite]))
    return max(changes, default=0.0)


def _flat(outputs: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
