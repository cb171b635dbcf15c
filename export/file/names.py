"""Each value of the ONNX graph gets the name of the packed graph's node that it comes from.

The exporter traces the graph twice, and each trace makes names of its own, but notes with every operation the node that
it comes from (torch.fx's ``from_node``).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import GraphModule, Node

from ti_fx.ir import roles
from ti_fx.ir.edit import constant_size

_LARGE = (
    1024  # bytes from which on a constant gets a name that says where it belongs; short ones are kept short
)


def origins(program: torch.export.ExportedProgram, gm: GraphModule) -> dict[str, str]:
    """Return the node of ``gm`` that each of the program's nodes comes from, by name."""
    parts = {
        (node.args[0].name, node.args[1]): node.name
        for node in gm.graph.nodes
        if node.target is operator.getitem and isinstance(node.args[0], Node)
    }
    found = {}
    for node in program.graph.nodes:
        origin = _origin(node.meta.get("from_node") or (), id(gm.graph))
        if node.target is operator.getitem:  # noted as what it is a part of
            origin = parts.get((origin, node.args[1]), origin)
        if origin:
            found[node.name] = origin
    return found


def _origin(sources: Iterable[Any], graph: int) -> str:
    for source in sources:
        found = str(source.name) if source.graph_id == graph else _origin(source.from_node, graph)
        if found:
            return found
    return ""


def restore_names(
    model: ir.Model, program: torch.export.ExportedProgram, lowered: GraphModule, packed: GraphModule
) -> None:
    """Name each value of the ONNX graph after the node that it is, and what leads to it ``node/Operator``.

    Args:
        model: the exported model, whose values have the names of the program's nodes.
        program: what it was translated from.
        lowered: the graph that was traced.
        packed: what it was lowered from: a node of both has the same value in both.
    """
    sources = origins(program, lowered)
    last = {origin: name for name, origin in sources.items()}
    own = {node.name for node in packed.graph.nodes}
    nodes = {node.name: node for node in lowered.graph.nodes if node.name in own or roles.fact(node, "named")}
    traced = {node.name: node for node in program.graph.nodes}
    values = {
        name: origin
        for origin, name in last.items()
        if origin in nodes and _same_kind(traced[name], nodes[origin])
    }
    fixed = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    inner = [
        value for node in model.graph.all_nodes() if node.graph is not model.graph for value in node.outputs
    ]
    taken = {value.name or "" for value in (*fixed, *inner)}
    owner = ""
    for node in reversed(list(model.graph)):
        names = [value.name or "" for value in node.outputs]
        owner = next((sources[name] for name in names if name in sources), owner)
        for value in node.outputs:
            if value.is_graph_output():
                continue
            name = values.get(value.name or "") or f"{owner or 'graph'}/{node.op_type}"
            value.name = _free(name, taken)
        node.name = f"{node.outputs[0].name}" if node.outputs else ""
    known = {name for name, _ in (*lowered.named_parameters(), *lowered.named_buffers())}
    for value in list(model.graph.initializers.values()):
        if value.name not in known and value.const_value is not None and value.const_value.nbytes >= _LARGE:
            # what the exporter computed of stored tensors: a head's matrix, the other way round
            reader = next((node.name for node, _ in value.uses()), None)
            value.name = _free(f"{reader or 'graph'}/constant", taken)


def _same_kind(traced: Node, node: Node) -> bool:
    """Whether a traced node can be a node's value: same dtype and rank, and no size that differs for certain."""
    left, right = traced.meta.get("val"), node.meta.get("val")
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return False
    if left.dtype != right.dtype or left.dim() != right.dim():
        return False
    sizes = [(constant_size(a), constant_size(b)) for a, b in zip(left.shape, right.shape, strict=True)]
    return all(a is None or b is None or a == b for a, b in sizes)


def _free(name: str, taken: set[str]) -> str:
    free, count = name, 1
    while free in taken:
        count += 1
        free = f"{name}/{count}"
    taken.add(free)
    return free
