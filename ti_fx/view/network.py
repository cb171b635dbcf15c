"""``to_networkx`` returns the graph as a networkx.DiGraph, for questions and for other tools."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import networkx
import torch
from torch import nn
from torch.fx import GraphModule, Node

from ti_fx.errors import InputError
from ti_fx.files import atomic_write
from ti_fx.find.attention import POINTS, find_attention
from ti_fx.ir import roles
from ti_fx.ir.edit import tensor
from ti_fx.ir.outputs import model_outputs, named_leaves, prepared_result
from ti_fx.ir.text import module_path, operation
from ti_fx.view.costs import count, elements, evaluated, multiply_accumulates
from ti_fx.view.places import parts, places

FORMATS = (".graphml", ".dot", ".json")


def to_networkx(gm: GraphModule, sizes: Mapping[str, int] | None = None) -> networkx.DiGraph[str]:
    """Return the graph with a node a name, in graph order, and an edge from each value to each reader of it.

    Node attributes; one that does not apply is absent:

    ======================  ======================================================================================
    op                      as in a dump: ``linear``, ``softmax.int``, ``input``; ``parameter`` or ``buffer``
    role                    shared, student, teacher or loss
    target                  the stored tensor's name
    stack, layer, kind      the attention block or feed-forward block that the node belongs to (``self``, ``cross``,
                            ``feed-forward``, ``before``, ``after``)
    part                    query, key, value, scores, map, context, output or residual (joined by blanks)
    point                   map, context or output
    intervened              the point at which the teacher's value is read instead
    twin                    of a teacher node: the student node it is a copy of
    shape, dtype            a tuple of numbers and dimension names; ``float32``
    module                  path of the user's module that made the node
    multiply_accumulates,   cost, as numbers or text in the dimensions' names; ``sizes={"batch": 8, "sequence": 128}``
    parameter_elements,     makes numbers of them
    activation_elements
    ======================  ======================================================================================

    Edge attribute: ``position``, where the reader has it: ``0``, ``1``, ``mask`` (a keyword), ``0.2`` (inside a list);
    several are joined by blanks.

    Graph attributes: ``loss`` (the name of the loss node, absent if there is none) and ``outputs`` (the names of the
    model's own outputs).

    Raises:
        InputError: ``sizes`` names a dimension that the graph does not have.
    """
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    graph.graph.update(_results(gm))
    where, named = places(gm), parts(find_attention(gm))
    twins = roles.twins(gm.graph)
    for node in gm.graph.nodes:
        place = where.get(node)
        part = named.get(twins.get(node, node), ())
        attributes = {
            "op": _operation(gm, node),
            "role": roles.role(node),
            "target": node.target if node.op == "get_attr" else None,
            "stack": place.stack if place else None,
            "layer": place.layer if place else None,
            "kind": place.kind if place else None,
            "part": " ".join(part) or None,
            "point": next((name for name in part if name in POINTS), None),
            "intervened": roles.fact(node, "intervened"),
            "twin": twins[node].name if node in twins else None,
            "module": module_path(node) or None,
            **_type(gm, node),
            **_cost(gm, node, sizes),
        }
        graph.add_node(node.name, **{key: value for key, value in attributes.items() if value is not None})
    for node in gm.graph.nodes:
        positions: dict[str, list[str]] = {}
        for position, source in _reads(node):
            positions.setdefault(source.name, []).append(position)
        for name, found in positions.items():
            graph.add_edge(name, node.name, position=" ".join(found))
    return graph


def write_graph(
    gm: GraphModule, path: str | os.PathLike[str], sizes: Mapping[str, int] | None = None
) -> None:
    """Write :func:`to_networkx` as GraphML, DOT or JSON (networkx's node-link form), by the suffix of ``path``.

    Shapes are lists in JSON and text elsewhere.

    Raises:
        InputError: another suffix, or the file can't be written; a file that was there stays as it was.
    """
    suffix = Path(path).suffix
    if suffix not in FORMATS:
        raise InputError(f"can't write a graph as {Path(path).name!r}; end the name in {', '.join(FORMATS)}")
    graph = to_networkx(gm, sizes)
    if suffix == ".json":
        atomic_write(path, json.dumps(networkx.node_link_data(graph, edges="edges"), indent=1) + "\n")
        return
    _flatten(graph.graph)
    for _, attributes in graph.nodes(data=True):
        _flatten(attributes)
    if suffix == ".dot":
        atomic_write(path, _dot(graph))
        return
    buffer = BytesIO()
    networkx.write_graphml(graph, buffer)
    atomic_write(path, buffer.getvalue())


def _results(gm: GraphModule) -> dict[str, Any]:
    result = prepared_result(gm)
    loss = {} if result is None else {"loss": result.loss.name}
    return {**loss, "outputs": [node.name for node in named_leaves(model_outputs(gm)).values()]}


def _operation(gm: GraphModule, node: Node) -> str:
    if node.op == "get_attr":
        return "parameter" if isinstance(tensor(gm, str(node.target)), nn.Parameter) else "buffer"
    return "output" if node.op == "output" else operation(gm, node)


def _type(gm: GraphModule, node: Node) -> dict[str, Any]:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return {}
    sizes = tuple(evaluated(gm, count(size), None) for size in value.shape)
    return {"shape": sizes, "dtype": str(value.dtype).removeprefix("torch.")}


def _cost(gm: GraphModule, node: Node, sizes: Mapping[str, int] | None) -> dict[str, int | str]:
    if node.op == "get_attr":
        return {"parameter_elements": evaluated(gm, elements(node.meta.get("val")), sizes)}
    if node.op == "output" or not isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
        return {}
    return {
        "multiply_accumulates": evaluated(gm, multiply_accumulates(gm, node), sizes),
        "activation_elements": evaluated(gm, elements(node.meta["val"]), sizes),
    }


def _reads(node: Node) -> Iterator[tuple[str, Node]]:
    for index, argument in enumerate(node.args):
        yield from _inside(str(index), argument)
    for key, argument in node.kwargs.items():
        yield from _inside(key, argument)


def _inside(position: str, argument: Any) -> Iterator[tuple[str, Node]]:
    if isinstance(argument, Node):
        yield position, argument
    elif isinstance(argument, Mapping):
        for key, item in argument.items():
            yield from _inside(f"{position}.{key}", item)
    elif isinstance(argument, tuple | list):
        for index, item in enumerate(argument):
            yield from _inside(f"{position}.{index}", item)


def _flatten(attributes: dict[str, Any]) -> None:
    for key, value in attributes.items():
        if isinstance(value, tuple | list):
            attributes[key] = ", ".join(map(str, value))


def _dot(graph: networkx.DiGraph[str]) -> str:
    """Our attributes get a prefix: Graphviz would take ``shape`` and ``layer`` for its own."""
    lines = ["digraph {"]
    for name, attributes in graph.nodes(data=True):
        lines.append(f"  {_quoted(name)} [label={_quoted(name)}, {_attributes(attributes)}];")
    for source, reader, attributes in graph.edges(data=True):
        lines.append(f"  {_quoted(source)} -> {_quoted(reader)} [{_attributes(attributes)}];")
    return "\n".join([*lines, "}", ""])


def _attributes(attributes: Mapping[str, Any]) -> str:
    return ", ".join(f"ti_fx_{key}={_quoted(value)}" for key, value in attributes.items())


def _quoted(value: Any) -> str:
    return '"' + str(value).replace('"', '\\"') + '"'
