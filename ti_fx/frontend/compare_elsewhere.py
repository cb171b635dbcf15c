"""Compares the captured graph with its source model beside the example: at other sizes, with other rows and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ti_fx.errors import CaptureError, SizeError, first_line
from ti_fx.frontend.constant_mode import ConstantMode
from ti_fx.frontend.model_for_trace import unchanged_buffers, without_caches
from ti_fx.frontend.other_inputs import at_the_ends, other_sizes, resized
from ti_fx.ir.edit import mode
from ti_fx.ir.facts import facts
from ti_fx.numerics.closeness import largest

# Captured against source, of the largest entry: eager attention sums in another order.
RELATIVE_TOLERANCE = 1e-5


def compare_elsewhere(
    model: nn.Module,
    gm: GraphModule,
    tensors: dict[str, Tensor],
    constants: dict[str, Any],
    further: dict[str, float],
    left_out: list[str],
) -> None:
    """Compare in eval mode: indices at the ends of their tables, and a few sizes that the graph claims to take.

    At other sizes rows come in another order, and one comes alone. Adds to ``further`` and ``left_out``.

    Raises:
        CaptureError: the graph differs from the model at the example's sizes.
        SizeError: it does at others.
    """
    name = type(model).__name__
    ends = at_the_ends(gm, tensors)
    changed = any(value is not tensors[key] for key, value in ends.items())
    with mode(model, False), mode(gm, False):
        if changed:
            found = _distance(model, gm, ends, constants)
            if isinstance(found, str):
                left_out.append(f"indices at the ends of their tables not compared: {found}")
                ends = tensors
            else:
                further["ends of tables"] = found[0]
                if not found[0] <= found[1]:
                    raise CaptureError(
                        f"the captured graph of {name} differs from the model for ids at the ends of their tables "
                        f"(relative {found[0]:.1e}): Python decides by values what is computed; make it a tensor "
                        "operation"
                    )
        tried = [{key: tuple(value.shape) for key, value in tensors.items()}]
        for sizes in other_sizes(gm, tensors):
            inputs = resized(gm, ends, sizes)
            shapes = {key: tuple(value.shape) for key, value in inputs.items()}
            if shapes in tried:
                continue
            tried.append(shapes)
            at = ", ".join(
                f"{facts(gm).sizes.names.get(symbol, symbol)} {size}" for symbol, size in sizes.items()
            )
            found = _distance(model, gm, inputs, constants)
            if isinstance(found, str):
                left_out.append(f"not compared at {at}: {found}")
                continue
            further[at] = found[0]
            if not found[0] <= found[1]:
                raise SizeError(
                    f"the captured graph of {name} differs from the model at {at} (relative {found[0]:.1e}): Python "
                    "decides by sizes what is computed; make it a tensor operation, or capture with dynamic='none'"
                )


def _distance(
    model: nn.Module, gm: GraphModule, inputs: dict[str, Tensor], constants: dict[str, Any]
) -> tuple[float, float] | str:
    """Return how far graph and model are apart and how far they may be; or why they can't be compared."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), unchanged_buffers(model):
        torch.manual_seed(0)
        try:
            with ConstantMode():
                expected = without_caches(model(**inputs, **constants))
        except Exception as error:  # what it takes is its own to say
            return f"the model itself fails there ({first_line(error)})"
    with torch.no_grad(), torch.random.fork_rng(devices=[]), unchanged_buffers(model):
        torch.manual_seed(0)
        try:
            actual = gm(**inputs)
        except Exception as error:  # an answer that is refused is not a wrong one
            return f"the graph refuses that ({first_line(error)})"
    return difference(expected, actual), tolerance(expected)


def tolerance(value: Any) -> float:
    """Return how far outputs may be apart, relative to each tensor's largest entry."""
    leaves = [
        leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    coarsest = max((torch.finfo(leaf.dtype).eps for leaf in leaves), default=0.0)
    return max(RELATIVE_TOLERANCE, 8 * coarsest if coarsest > 1e-4 else 0.0)


def difference(expected: Any, actual: Any) -> float:
    """Return the largest difference of two output structures, relative to each tensor's largest entry."""
    left, right = pytree.tree_leaves(expected), pytree.tree_leaves(actual)
    pairs = [(a, b) for a, b in zip(left, right, strict=False) if isinstance(a, Tensor)]
    if len(left) != len(right):
        return float("inf")
    worst = 0.0
    for a, b in pairs:
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if not torch.equal(a, b):
            worst = max(worst, largest(b, a))
    return worst
