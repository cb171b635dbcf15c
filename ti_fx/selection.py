"""What a pass acts on: projections, word embeddings and heads by data flow, narrowed by globs over parameter names."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch.fx import GraphModule, Node

from ti_fx import encodings, numerics, roles
from ti_fx.dataflow import projection_weight
from ti_fx.errors import SelectionError, did_you_mean
from ti_fx.graph import aten_name, tensor
from ti_fx.structure import named_leaves

_INDEX_OPS = frozenset(
    [
        "view",
        "reshape",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "expand",
        "to",
        "_to_copy",
        "clone",
        "contiguous",
        "where",
        "masked_fill",
    ]
)
_LINEAR = frozenset(["linear", "addmm", "mm", "matmul"])


def projections(gm: GraphModule) -> list[Node]:
    """Return the student's linear projections: products of an activation and a parameter of two dimensions."""
    return [
        node
        for node in gm.graph.nodes
        if roles.is_student(node)
        and aten_name(node) in _LINEAR
        and (weight := projection_weight(node)) is not None
        and _is_matrix(gm, weight)
    ]


def _is_matrix(gm: GraphModule, weight: Node) -> bool:
    value = tensor(gm, str(weight.target))
    return value.dim() == 2 or value.dtype == torch.uint8  # uint8: packed codes


def heads(gm: GraphModule) -> set[Node]:
    """Return the model's heads: parametric ops from which no path to an output meets a further parametric op."""
    result = gm.graph.output_node().args[0]
    if isinstance(result, dict) and set(result) == {"loss", "losses", "outputs"}:
        result = result["outputs"]
    # past an intervention the search goes on in the student, as if there were none
    own = roles.twins(gm.graph)
    inputs = {node: [own.get(source, source) for source in node.all_input_nodes] for node in gm.graph.nodes}
    outputs = [own.get(node, node) for node in named_leaves(result).values()]
    reached = _upstream(outputs, inputs, stop=lambda node: _is_parametric(gm, node))
    last = {node for node in reached if _is_parametric(gm, node)}
    return last - _upstream((source for node in last for source in inputs[node]), inputs)


def _upstream(
    seeds: Iterable[Node],
    inputs: Mapping[Node, list[Node]],
    stop: Callable[[Node], bool] = lambda node: False,
) -> set[Node]:
    seen: set[Node] = set()
    queue = list(seeds)
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            queue += [] if stop(node) else inputs[node]
    return seen


def _is_parametric(gm: GraphModule, node: Node) -> bool:
    """Whether the node computes with a stored tensor; adding a bias or multiplying by one number does not count."""
    if not roles.is_student(node) or aten_name(node) == "add":
        return False
    if node.target in (numerics.ternary, encodings.unpack_ternary):
        return False
    sources = [source for source in node.all_input_nodes if _stored(source)]
    if aten_name(node) == "mul":
        sources = [source for source in sources if source.meta["val"].numel() > 1]
    return bool(sources)


def _stored(node: Node) -> bool:
    while node.target in (numerics.ternary, encodings.unpack_ternary) or aten_name(node) in (
        "t",
        "transpose",
    ):
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def word_embeddings(gm: GraphModule, min_rows: int) -> list[Node]:
    """Return the look-ups in tables of at least ``min_rows`` rows whose index is an integer input of the graph."""
    return [
        node
        for node in gm.graph.nodes
        if roles.is_student(node)
        and aten_name(node) == "embedding"
        and (table := _table(node)) is not None
        and tensor(gm, str(table.target)).shape[0] >= min_rows
        and _is_input(node.args[1])
    ]


def _table(node: Node) -> Node | None:
    source = node.args[0]
    while isinstance(source, Node) and source.target is numerics.ternary:
        source = source.args[0]
    return source if isinstance(source, Node) and source.op == "get_attr" else None


def table(node: Node) -> Node:
    """Return the get_attr node of an embedding's table."""
    found = _table(node)
    assert found is not None
    return found


def _is_input(argument: object) -> bool:
    node = argument
    while isinstance(node, Node) and aten_name(node) in _INDEX_OPS:
        tensors = [
            source for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Tensor)
        ]
        node = next(
            (
                source
                for source in tensors
                if not source.meta["val"].dtype.is_floating_point and source.meta["val"].dtype != torch.bool
            ),
            None,
        )
    return isinstance(node, Node) and node.op == "placeholder"


def skipped(names: Iterable[str], globs: Sequence[str], what: str) -> set[str]:
    """Return the parameter names that a skip glob matches (``*.query.weight``, or a module's path).

    Raises:
        SelectionError: a glob matches none of ``names``; near names are listed.
    """
    names = list(dict.fromkeys(names))
    found: set[str] = set()
    for glob in globs:
        matching = {
            name
            for name in names
            if fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.rpartition(".")[0], glob)
        }
        if not matching:
            raise SelectionError(f"skip={glob!r} matches no {what}{did_you_mean(glob, _alike(glob, names))}")
        found |= matching
    return found


def _alike(glob: str, names: Sequence[str]) -> list[str]:
    """Return names and module paths; for ``*.a.b``, cut to as many parts, so that near ones look near."""
    paths = list(dict.fromkeys([*names, *(name.rpartition(".")[0] for name in names)]))
    first, *parts = glob.split(".")
    if first != "*" or not parts:
        return paths
    return list(dict.fromkeys(".".join(["*", *path.split(".")[-len(parts) :]]) for path in paths))
