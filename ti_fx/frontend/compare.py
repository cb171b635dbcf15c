"""Compares the captured graph with its source model, in both modes, on the example."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ti_fx.errors import CaptureError, first_line
from ti_fx.frontend.compare_elsewhere import compare_elsewhere, difference, tolerance
from ti_fx.frontend.compare_training import compare_buffers, compare_gradients
from ti_fx.frontend.constant_mode import ConstantMode
from ti_fx.frontend.model_for_trace import (
    has_moved,
    python_state,
    unchanged_buffers,
    values_of_buffers,
    without_caches,
    written_buffers,
)
from ti_fx.ir.edit import mode, written_arguments
from ti_fx.ir.shapes import signature

# Parameters times tokens beyond which gradients and other sizes cost too much.
LARGE = 2e10


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


def evaluation_writes(
    program: torch.export.ExportedProgram,
    model: nn.Module,
    tensors: dict[str, Tensor],
    constants: dict[str, Any],
) -> set[str]:
    """Return the names of the buffers that the model writes into in evaluation, if its program writes into anything.

    On the meta device there is none: what a model writes there can't be seen.
    """
    graphs = [part for part in program.graph_module.modules() if isinstance(part, GraphModule)]
    writes = any(written_arguments(node) for part in graphs for node in part.graph.nodes)
    if not writes or next(model.buffers(), None) is None or any(value.is_meta for value in tensors.values()):
        return set()
    with mode(model, False), torch.random.fork_rng(devices=[]), torch.no_grad(), ConstantMode():
        return written_buffers(model, lambda: model(**tensors, **constants))


@dataclass
class Compared:
    """What a comparison with the source model found.

    Attributes:
        checked: the largest relative difference of the outputs on the example, in ``eval`` and ``train`` mode.
        further: the same of what else was compared: buffers, gradients, other sizes and values.
        unchecked: what could not be compared on the example, and why; None if everything was.
        left_out: further comparisons that could not be made, and why.
    """

    checked: dict[str, float] = field(default_factory=dict)
    further: dict[str, float] = field(default_factory=dict)
    unchecked: str | None = None
    left_out: list[str] = field(default_factory=list)


def compare_values(
    model: nn.Module, gm: GraphModule, tensors: dict[str, Tensor], constants: dict[str, Any]
) -> Compared:
    """Compare the graph with the source model: on the example in both modes, then as far as its claims go.

    Raises:
        CaptureError: they differ.
        SizeError: they differ at a size beside the example's.
    """
    found = compare_modes(model, gm, tensors, constants)
    cost = sum(parameter.numel() for parameter in model.parameters()) * _tokens(tensors)
    if cost > LARGE:
        found.left_out.append(
            f"gradients and other sizes not compared: parameters times tokens are {cost:.0e}; capture with a shorter "
            "example"
        )
        return found

    def run_model() -> Any:
        torch.manual_seed(0)
        with ConstantMode():
            return without_caches(model(**tensors, **constants))

    def run_graph() -> Any:
        torch.manual_seed(0)
        return gm(**tensors)

    with torch.random.fork_rng(devices=_devices(tensors)):
        worst, why = compare_gradients(model, gm, run_model, run_graph, "train" in found.checked)
    if worst is not None:
        found.further["gradients"] = worst
    if why is not None:
        found.left_out.append(why)
    compare_elsewhere(model, gm, tensors, constants, found.further, found.left_out)
    return found


def compare_modes(
    model: nn.Module, gm: GraphModule, tensors: dict[str, Tensor], constants: dict[str, Any]
) -> Compared:
    """Compare outputs and buffers on these inputs, in both modes, and a second call where the first leaves a trace.

    Raises:
        CaptureError: they differ.
    """
    found = Compared()
    outlines: list[list[torch.Size]] = []
    for name, training in (("eval", False), ("train", True)):
        with (
            mode(model, training),
            mode(gm, training),
            torch.random.fork_rng(devices=_devices(tensors)),
            torch.no_grad(),
        ):
            torch.manual_seed(0)
            try:
                # a number that nothing depends on is not drawn in the graph
                with ConstantMode(), unchanged_buffers(model):
                    state = python_state(model)
                    expected = without_caches(model(**tensors, **constants))
                    drawn = torch.get_rng_state()
                    buffers = values_of_buffers(model)
                    again = has_moved(model, state) and without_caches(model(**tensors, **constants))
            except Exception as error:
                if not training:
                    raise
                found.unchecked = (
                    "not compared with the model in train mode, where it fails on the example: "
                    f"{first_line(error)}"
                )
                return found
            torch.manual_seed(0)
            undrawn = torch.get_rng_state()
            with unchanged_buffers(model):
                actual = _run(gm, tensors, type(model).__name__)
                drawn_by_graph = torch.get_rng_state()
                moved = values_of_buffers(model)
                second = None if again is False else _run(gm, tensors, type(model).__name__)
        if not training and torch.equal(drawn, undrawn) and not torch.equal(drawn_by_graph, undrawn):
            raise CaptureError(
                f"the captured graph of {type(model).__name__} draws random numbers in eval mode, where the model "
                "draws none: Python decides by the mode what is drawn; turn that off in its config"
            )
        outlines.append([leaf.shape for leaf in pytree.tree_leaves(expected) if isinstance(leaf, Tensor)])
        if outlines[0] != outlines[-1]:
            found.unchecked = (
                "not compared with the model in train mode, where it returns other outputs than in eval mode: the "
                "graph returns those of eval mode, with dropout in training"
            )
            return found
        found.checked[name] = difference(expected, actual)
        if not found.checked[name] <= tolerance(expected):
            raise CaptureError(
                f"the captured graph of {type(model).__name__} differs from the model in {name} mode (relative "
                f"{found.checked[name]:.1e}): something is decided in Python by the mode or at random; turn it off in "
                "the model's config (layerdrop, masking)"
            )
        if buffers:
            found.further[f"buffers after {name}"] = compare_buffers(model, buffers, moved, name)
        if again is not False:
            found.further[f"a second call in {name}"] = difference(again, second)
            if not difference(again, second) <= tolerance(again):
                raise CaptureError(
                    f"the captured graph of {type(model).__name__} differs from the model in a second call in {name} "
                    "mode: forward keeps something between calls outside its buffers, which a graph does not "
                    "have; keep it in a buffer, and write that in training alone"
                )
    return found


def _devices(tensors: dict[str, Tensor]) -> list[int]:
    return sorted({value.device.index or 0 for value in tensors.values() if value.is_cuda})


def _tokens(tensors: dict[str, Tensor]) -> int:
    """Return about how often each weight is multiplied in a forward."""
    return max(value.numel() if value.dim() < 3 else value[..., 0].numel() for value in tensors.values())


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
