"""Compares what training changes: which Parameters get gradients, and which; the buffers; and a call after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ti_fx.errors import CaptureError, first_line
from ti_fx.frontend.model_for_trace import unchanged_buffers
from ti_fx.ir.edit import mode
from ti_fx.numerics.closeness import gap

# Of the largest entry of a gradient, which the sums of a backward pass round more than those of a forward pass.
TOLERANCE = 1e-3
# A gradient smaller than this part of the largest is compared with that: one that is zero but for rounding is.
_SMALL = 1e-2

Gradients = dict[str, Tensor | None]


class BackwardError(Exception):
    """The backward pass of a module fails."""


def compare_gradients(
    model: nn.Module,
    gm: GraphModule,
    run_model: Callable[[], Any],
    run_graph: Callable[[], Any],
    training: bool,
) -> tuple[float | None, str | None]:
    """Compare the gradient of every Parameter for random gradients of the outputs; return what could not be, and why.

    Raises:
        CaptureError: a Parameter has a gradient in one of the two alone, or another one.
    """
    name = type(model).__name__
    try:
        with mode(model, training):
            expected = _gradients(model, run_model)
    except BackwardError as error:
        return None, f"gradients not compared: the model's own backward pass fails ({error})"
    if not any(value is not None for value in expected.values()):
        return None, "gradients not compared: the outputs have none"
    try:
        with mode(gm, training):
            found = _gradients(model, run_graph)
    except BackwardError as error:
        raise CaptureError(
            f"the backward pass of the captured graph of {name} fails ({error}), the model's own does not: forward "
            "changes in place what a gradient is computed from; write the result into a new tensor"
        ) from error
    largest = max(
        float(_finite(value).abs().max())
        for value in expected.values()
        if value is not None and value.numel()
    )
    worst = 0.0
    for parameter, value in expected.items():
        other = found[parameter]
        if (value is None) != (other is None):
            present = value if other is None else other
            assert present is not None
            if not present.any():
                continue
            where = "in the model alone" if other is None else "in the graph alone"
            raise CaptureError(
                f"{parameter} gets a gradient {where}: the captured graph of {name} does not train as the model; an "
                "autograd function of its own, or a region without gradients, is not seen by torch.export"
            )
        if value is None or other is None or not value.numel():
            continue
        scale = max(_size(value), _SMALL * largest)
        worst = max(worst, float(gap(other, value).max()) / scale if scale else 0.0)
        if not worst <= _tolerance(value):
            raise CaptureError(
                f"the gradient of {parameter} in the captured graph of {name} differs from the model's (relative "
                f"{worst:.1e}): forward has a gradient of its own (an autograd.Function, a hook), which a trace does "
                "not see; write it as detach and sum, value + (result - value).detach()"
            )
    return worst, None


def _gradients(model: nn.Module, run: Callable[[], Any]) -> Gradients:
    """Return the gradient of each Parameter, None of one that no output depends on."""
    with _all_trained(model) as parameters, unchanged_buffers(model), torch.enable_grad():
        outputs = [
            leaf
            for leaf in pytree.tree_leaves(run())
            if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()
        ]
        if not outputs:
            return dict.fromkeys(parameters)
        drawn = torch.Generator().manual_seed(0)
        given = [torch.randn(leaf.shape, generator=drawn).to(leaf.device, leaf.dtype) for leaf in outputs]
        try:
            found = torch.autograd.grad(outputs, list(parameters.values()), given, allow_unused=True)
        except RuntimeError as error:
            raise BackwardError(first_line(error)) from error
    return dict(zip(parameters, found, strict=True))


@contextmanager
def _all_trained(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Let every Parameter require a gradient; yield those that can."""
    found = {
        name: value
        for name, value in model.named_parameters()
        if value.is_floating_point() or value.is_complex()
    }
    before = [(value, value.requires_grad) for value in found.values()]
    for value in found.values():
        value.requires_grad_(True)
    try:
        yield found
    finally:
        for value, trained in before:
            value.requires_grad_(trained)


def compare_buffers(
    model: nn.Module, expected: dict[str, Tensor], found: dict[str, Tensor], name: str
) -> float:
    """Compare what a run of the model and one of the graph left in the model's buffers; return how far they are apart.

    Raises:
        CaptureError: one is not where the model's run left it.
    """
    worst = 0.0
    for buffer, value in expected.items():
        other = found[buffer]
        if value.shape != other.shape or not value.numel() or torch.equal(value, other):
            continue
        distance = float(gap(other, value).max() / _finite(value).abs().max().clamp(min=1e-30))
        worst = max(worst, distance)
        if not distance <= (_tolerance(value) if value.is_floating_point() else 0.0):
            raise CaptureError(
                f"after a run in {name} the buffer {buffer} of {type(model).__name__} is not what the captured graph "
                "makes it: write into it in place (copy_, add_), by tensor operations, and in training alone"
            )
    return worst


def _size(value: Tensor | None) -> float:
    return 0.0 if value is None or not value.numel() else float(_finite(value).abs().max())


def _tolerance(value: Tensor) -> float:
    eps = torch.finfo(value.dtype).eps
    return max(TOLERANCE, 32 * eps if eps > 1e-4 else 0.0)


def _finite(value: Tensor) -> Tensor:
    return value.detach().masked_fill(~value.isfinite(), 0.0)
