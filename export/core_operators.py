"""Tells whether torch.onnx must decompose a traced program, or knows every operator of it as it stands."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten
# What the exporter leaves out of a graph before it translates it.
_LEFT_OUT = {
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range_for_size.default,
}
# Views that it translates as they stand.
_VIEWS = {aten.contiguous.default, aten.flatten.using_ints, aten.reshape.default}


def needs_decomposition(program: ExportedProgram, registry: Any) -> bool:
    """Return whether some operator of a program is one that torch.onnx has to decompose first.

    Args:
        program: as torch.export made it.
        registry: torch.onnx's, of the operators that it can translate.
    """
    known = {found[0].fx_target for found in registry.functions.values()}
    return any(
        not _is_core(node, known)
        for module in program.graph_module.modules()
        for node in getattr(module, "graph", program.graph).nodes
        if node.op == "call_function"
    )


def _is_core(node: Node, known: set[Any]) -> bool:
    """Tell whether decomposition would leave a node as it is."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return not isinstance(target, torch._ops.HigherOrderOperator)  # arithmetic of sizes
    if target in _LEFT_OUT or target in _VIEWS:
        return True
    return target in known and not target._schema.is_mutable and not _is_split_up(target)


def _is_split_up(target: torch._ops.OpOverload) -> bool:
    """Tell whether a trace splits up an operator whatever it is asked for: a view made of others."""
    is_view = any(one.alias_info is not None for one in target._schema.returns)
    return is_view and target._can_decompose()
