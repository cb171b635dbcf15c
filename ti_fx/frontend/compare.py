"""Compares the captured graph with its source model, in both modes, on the example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ti_fx.errors import CaptureError, first_line
from ti_fx.frontend.constant_mode import ConstantMode
from ti_fx.frontend.model_for_trace import unchanged_buffers, without_caches
from ti_fx.ir.edit import mode
from ti_fx.ir.shapes import signature
from ti_fx.numerics.closeness import largest

# Captured against source, of the largest entry: eager attention sums in another order.
RELATIVE_TOLERANCE = 1e-5


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that draw random numbers."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def draws_alike(
    model: nn.Module, gm: GraphModule, tensors: dict[str, Tensor], constants: dict[str, Any]
) -> bool:
    """Whether model and graph draw random numbers as often in training: a layer that is dropped at random does not."""
    counts: list[int] = []
    for module, inputs in ((model, {**tensors, **constants}), (gm, tensors)):
        with (
            mode(module, True),
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            unchanged_buffers(model),
            ConstantMode(),
            _Draws() as draws,  # type: ignore[no-untyped-call]
        ):
            module(**inputs)
        counts.append(draws.count)
    return counts[0] == counts[1]


def compare_values(
    model: nn.Module, gm: GraphModule, tensors: dict[str, Tensor], constants: dict[str, Any]
) -> tuple[dict[str, float], str | None]:
    """Compare the graph with the source model on the example, in both modes; return what could not be."""
    checked: dict[str, float] = {}
    outlines: list[list[torch.Size]] = []
    devices = sorted({value.device.index or 0 for value in tensors.values() if value.is_cuda})
    for name, training in (("eval", False), ("train", True)):
        with (
            mode(model, training),
            mode(gm, training),
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
        ):
            torch.manual_seed(0)
            try:
                # a number that nothing depends on is not drawn in the graph
                with ConstantMode(), unchanged_buffers(model):
                    expected = without_caches(model(**tensors, **constants))
            except Exception as error:
                if not training:
                    raise
                return (
                    checked,
                    "not compared with the model in train mode, where it fails on the example: "
                    f"{first_line(error)}",
                )
            drawn = torch.get_rng_state()
            torch.manual_seed(0)
            undrawn = torch.get_rng_state()
            with unchanged_buffers(model):
                actual = _run(gm, tensors, type(model).__name__)
            drawn_by_graph = torch.get_rng_state()
        if not training and torch.equal(drawn, undrawn) and not torch.equal(drawn_by_graph, undrawn):
            raise CaptureError(
                f"the captured graph of {type(model).__name__} draws random numbers in eval mode, where the model "
                "draws none: Python decides by the mode what is drawn; turn that off in its config"
            )
        outlines.append([leaf.shape for leaf in pytree.tree_leaves(expected) if isinstance(leaf, Tensor)])
        if outlines[0] != outlines[-1]:
            return (
                checked,
                "not compared with the model in train mode, where it returns other outputs than in eval mode: the "
                "graph returns those of eval mode, with dropout in training",
            )
        checked[name] = _difference(expected, actual)
        if not checked[name] <= _tolerance(expected):
            raise CaptureError(
                f"the captured graph of {type(model).__name__} differs from the model in {name} mode (relative "
                f"{checked[name]:.1e}): something is decided in Python by the mode or at random; turn it off in the "
                "model's config (layerdrop, masking)"
            )
    return checked, None


def compare_shapes(
    model: nn.Module, gm: GraphModule, tensors: dict[str, Tensor], constants: dict[str, Any]
) -> str:
    """Compare shapes and dtypes where there are no values, in both modes, and return what that leaves open."""
    for name, training in (("eval", False), ("train", True)):
        with mode(model, training), mode(gm, training), torch.no_grad():
            try:
                expected = without_caches(model(**tensors, **constants))
            except (NotImplementedError, RuntimeError) as error:  # it looks at a value
                reason = first_line(error)
                return (
                    f"not compared with the model in {name} mode: it does not run without values ({reason})"
                )
            if signature(expected) != signature(_run(gm, tensors, type(model).__name__)):
                raise CaptureError(
                    f"the captured graph of {type(model).__name__} returns other shapes or dtypes than the model in "
                    f"{name} mode; capture it with values to see where they part"
                )
    return (
        "values not compared with the model, whose tensors have none on the meta device; in eval and train mode shapes "
        "and dtypes are equal"
    )


def _run(gm: GraphModule, tensors: dict[str, Tensor], name: str) -> Any:
    try:
        return gm(**tensors)
    except Exception as error:  # an operation, on sizes that only this example's values let pass
        raise CaptureError(
            f"the captured graph of {name} fails on the example, where the model does not: {first_line(error)}; check "
            "that the inputs' sizes fit each other"
        ) from error


def _tolerance(value: Any) -> float:
    leaves = [
        leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    coarsest = max((torch.finfo(leaf.dtype).eps for leaf in leaves), default=0.0)
    return max(RELATIVE_TOLERANCE, 8 * coarsest if coarsest > 1e-4 else 0.0)


def _difference(expected: Any, actual: Any) -> float:
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
