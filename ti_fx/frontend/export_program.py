"""One model through torch.export: which sizes are dynamic, and what Python may read on the way."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ti_fx.errors import first_line
from ti_fx.frontend.constant_mode import Concrete
from ti_fx.frontend.decisions import Decisions
from ti_fx.frontend.patches import (
    _broadcast_masks,
    _keywords_only,
    _modules_stay,
    _taken_for_hit,
    _without_checks,
)

Dynamic = Literal["auto", "all", "batch", "none"]
# Inputs of this many dimensions are images and videos: their sizes as symbols cost minutes of algebra.
IMAGE_RANK = 4

BATCH = "batch"


def _dynamic_shapes(tensors: dict[str, Tensor], dynamic: Dynamic) -> tuple[dict[str, Any], dict[str, str]]:
    if dynamic == "none":
        return dict.fromkeys(tensors), {}
    batch = next((value.shape[0] for value in tensors.values() if value.dim()), 0)
    named = torch.export.Dim(BATCH)
    shapes: dict[str, Any] = {}
    static: dict[str, str] = {}
    for name, value in tensors.items():
        dims: dict[int, Any] = {}
        for index, size in enumerate(value.shape):
            if index == 0 and size == batch and batch > 1:
                dims[index] = named
            elif dynamic == "auto" and value.dim() >= IMAGE_RANK:
                static[f"{name}.{index}"] = (
                    f"dynamic='auto' fixes it at {size}, as in every input of {IMAGE_RANK} or more dimensions; "
                    "dynamic='all' does not"
                )
            elif dynamic in ("auto", "all") and size > 1:
                dims[index] = torch.export.Dim.AUTO
            elif dynamic in ("auto", "all"):
                static[f"{name}.{index}"] = f"the example's size is {size}; give an example of at least 2"
        shapes[name] = dims or None
    return shapes, static


@dataclass(frozen=True)
class Known:
    """What a trace knows beside the model.

    Attributes:
        baked: values of inputs that are constants of the program.
        numbers: the model's buffers of one whole number.
        decisions: what Python read on the example; None: what it reads may not depend on values.
    """

    baked: dict[str, Tensor] = field(default_factory=dict)
    numbers: tuple[Tensor, ...] = ()
    decisions: Decisions | None = None


def export_program(
    model: nn.Module, tensors: dict[str, Tensor], constants: dict[str, Any], dynamic: Dynamic, known: Known
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """Return the program, and why a dimension is not dynamic, by ``input.dimension``.

    Sizes that the model ties or fixes in a way that can't be expressed are fixed: all but the batch, or all.
    """
    constants = {**constants, **known.baked}
    follows = known.decisions is not None
    rungs: list[Dynamic] = [dynamic]
    if dynamic in ("auto", "all"):
        rungs += (
            ["none"] if known.baked else ["batch", "none"]
        )  # values that are constants mostly fix the batch, too
    reason = ""
    spare: tuple[torch.export.ExportedProgram, dict[str, str]] | None = None
    for rung in rungs:
        shapes, static = _dynamic_shapes(tensors, rung)
        if reason:
            static = {
                f"{name}.{index}": reason
                for name, value in tensors.items()
                for index in range(int(rung == "batch"), value.dim())
            }
        try:
            program = _trace(model, tensors, constants, shapes, known)
            if fixed := _fixed_by_equalities(program, tensors):
                for name, index in fixed:
                    del shapes[name][index]
                    size = tensors[name].shape[index]
                    static[f"{name}.{index}"] = f"the model's code fixes {name}.{index} at {size}"
                program = _trace(model, tensors, constants, shapes, known)
        except Exception as error:
            # what reads values may do without them where sizes are numbers
            if rung == rungs[-1] or not (known.baked or follows or _is_about_shapes(error)):
                if spare is None:
                    raise
                break
            reason = reason or _shape_reason(error)
            continue
        if not (follows and has_open_sizes(program)):
            return program, static
        spare = spare or (program, static)
        reason = (
            reason or "the model computes sizes from it with tensors, which only a fixed size makes numbers"
        )
    assert spare is not None
    return spare


def _trace(
    model: nn.Module,
    tensors: dict[str, Tensor],
    constants: dict[str, Any],
    shapes: dict[str, Any],
    known: Known,
) -> torch.export.ExportedProgram:
    printed = io.StringIO()  # torch prints the half-made graph of a failed trace
    if known.decisions is not None:
        known.decisions.restart()
    with (
        _modules_stay(),
        _keywords_only(model, list(tensors), constants),
        torch.random.fork_rng(devices=[]),
        redirect_stderr(printed),
        _without_checks(known.decisions is not None),
        _broadcast_masks(),
        Concrete([*known.baked.values(), *known.numbers], decisions=known.decisions) as concrete,
        _taken_for_hit(concrete),
    ):
        exported = torch.export.export(model, (), tensors, dynamic_shapes=shapes, strict=False)
    sys.stderr.write(printed.getvalue())
    return exported


def _fixed_by_equalities(
    program: torch.export.ExportedProgram, tensors: dict[str, Tensor]
) -> list[tuple[str, int]]:
    """Return the dimensions that are symbols in the program and whose equalities hold at no size but the example's.

    Where one has several symbols, torch.export does not solve it: 8 * bins * (length // (length // 8)) = 256.
    """
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    places: dict[Any, list[tuple[str, int]]] = {}
    for name, given in zip(tensors, program.graph_signature.user_inputs, strict=True):
        for index, size in enumerate(nodes[str(given)].meta["val"].shape):
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
                places.setdefault(size.node.expr, []).append((name, index))
    own = {
        symbol: tensors[name].shape[index]
        for symbol, ((name, index), *_) in places.items()
        if symbol.is_Symbol
    }
    equalities = [one.expr for one in environment.guards if one.expr.is_Equality] if own else []

    def changes(symbol: Any, size: int) -> bool:
        asked = [one for one in equalities if symbol in one.free_symbols]
        others = (2 * size, 3 * size, size // 2, *range(size + 1, size + 33), *range(2, size))
        return any(
            all(may_hold(one, {**scaled, symbol: other}) for one in asked)
            for other in others
            for scaled in (own, {one: 2 * value for one, value in own.items()})
        )

    return [place for symbol, size in own.items() if not changes(symbol, size) for place in places[symbol]]


def may_hold(equality: Any, sizes: Mapping[Any, int]) -> bool:
    """Whether an equality of sizes is not known to fail; what further symbols leave open is neither true nor false."""
    try:
        return bool(equality.subs(sizes) != False)  # noqa: E712
    except ZeroDivisionError:  # 256 // (length // 8) has no value at a length below 8
        return False


def has_open_sizes(program: torch.export.ExportedProgram) -> bool:
    """Whether the size of an output or of a map depends on values: a teacher's may differ from a student's."""
    nodes = program.graph.nodes
    maps = [node for node in nodes if "softmax" in getattr(node.target, "__name__", "")]
    return any(
        free_unbacked_symbols(node.meta["val"].shape)
        for node in [*maps, *program.graph.output_node().all_input_nodes]
        if isinstance(node.meta.get("val"), Tensor)
    )


def _is_about_shapes(error: Exception) -> bool:
    return bool(re.search(r"[Cc]onstraint|dynamic_shapes|specializ", str(error)))


def _shape_reason(error: BaseException) -> str:
    """Return which size the model's code fixes, as far as torch.export tells."""
    found = re.search(
        r"marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)", str(error)
    )
    return f"the model's code fixes {found[1]} at {found[2]}" if found else first_line(error)
