"""Says which sizes of the inputs a graph leaves open: asked of torch.export, found in its program, and named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ti_fx.ir.edit import constant_size

Dynamic = Literal["auto", "all", "batch", "none"]
# Inputs of this many dimensions are images and videos: their sizes as symbols cost minutes of algebra.
IMAGE_RANK = 4

BATCH = "batch"


def has_own_batches(tensors: dict[str, Tensor]) -> bool:
    """Return whether inputs have several numbers of rows: an image with two texts."""
    return len({value.shape[0] for value in tensors.values() if value.dim() > 1 and value.shape[0] > 1}) > 1


def dynamic_shapes(
    tensors: dict[str, Tensor], dynamic: Dynamic, own_batches: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what torch.export is asked to leave open, and why a dimension is not, by ``input.dimension``.

    ``own_batches`` leaves the rows of an input open that has another number of them than the first.
    """
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
            elif own_batches and index == 0 and size > 1 and value.dim() > 1:
                dims[index] = torch.export.Dim.AUTO
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


def with_suggested_batch(said: str, shapes: dict[str, Any]) -> dict[str, Any] | None:
    """Return what to ask torch.export instead, where it says which batches the model's branches allow.

    It names bounds (``Dim('batch', max=4)``), multiples (``2*_batch``) or one number. None: it says nothing.
    """
    fixes = dict(re.findall(r"^\s+(_?batch) = (.*)$", said.partition("Suggested fixes")[2], re.MULTILINE))
    if BATCH not in fixes:
        return None
    fix = fixes[BATCH]
    dims = {name: _dim(name, text) for name, text in fixes.items() if text.startswith("Dim(")}
    multiple = re.fullmatch(r"(?:(\d+)\*)?_batch(?: \+ (\d+))?", fix)
    new: Any = None
    if BATCH in dims:
        new = dims[BATCH]
    elif multiple is not None:
        new = int(multiple[1] or 1) * dims.get("_batch", torch.export.Dim("_batch"))
        new = new + int(multiple[2]) if multiple[2] else new
    elif not fix.isdigit():
        return None
    found = {}
    for name, dims_of in shapes.items():
        known = {
            index: dim
            for index, dim in (dims_of or {}).items()
            if index or not isinstance(dim, torch.export.Dim)
        }
        batch = dims_of is not None and len(known) < len(dims_of)
        found[name] = ({0: new} if batch and new is not None else {}) | known or None
    return found


def _dim(name: str, text: str) -> torch.export.Dim:
    bounds = {key: int(value) for key, value in re.findall(r"(min|max)=(\d+)", text)}
    return torch.export.Dim(name, **bounds)


def places(
    program: torch.export.ExportedProgram, tensors: dict[str, Tensor]
) -> dict[tuple[str, int], torch.SymInt]:
    """Return the size of each dimension of an input that is open in the program, by input and dimension."""
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    return {
        (name, index): size
        for name, given in zip(tensors, program.graph_signature.user_inputs, strict=True)
        for index, size in enumerate(nodes[str(given)].meta["val"].shape)
        if isinstance(size, torch.SymInt)
    }


def fixed_by_equalities(
    program: torch.export.ExportedProgram, tensors: dict[str, Tensor]
) -> list[tuple[str, int]]:
    """Return the dimensions that are symbols in the program and whose equalities hold at no size but the example's.

    Where one has several symbols, torch.export does not solve it: 8 * bins * (length // (length // 8)) = 256.
    """
    by_expression: dict[Any, list[tuple[str, int]]] = {}
    for place, size in places(program, tensors).items():
        by_expression.setdefault(size.node.expr, []).append(place)
        environment = size.node.shape_env
    own = {
        symbol: tensors[name].shape[index]
        for symbol, ((name, index), *_) in by_expression.items()
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

    return [
        place for symbol, size in own.items() if not changes(symbol, size) for place in by_expression[symbol]
    ]


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


def named_sizes(
    gm: GraphModule, inputs: list[str]
) -> tuple[dict[str, tuple[str | int, ...]], dict[str, str]]:
    """Return each input's sizes, by name where they are dynamic, and the names by symbol.

    Dimension 0 is the batch, dimension 1 of a rank-2 input a sequence, others are named by input.
    """
    names: dict[str, str] = {}
    dims: dict[str, tuple[str | int, ...]] = {}
    placeholders = {node.target: node for node in gm.graph.find_nodes(op="placeholder")}
    for name in inputs:
        sizes: list[str | int] = []
        for index, size in enumerate(placeholders[name].meta["val"].shape):
            if (constant := constant_size(size)) is not None:
                sizes.append(constant)
                continue
            symbol = str(size)
            if symbol not in names:
                base = BATCH if index == 0 else "sequence" if index == 1 else f"{name}_{index}"
                names[symbol] = base if base not in names.values() else f"{name}_{base}"
            sizes.append(names[symbol])
        dims[name] = tuple(sizes)
    return dims, names
