"""Weights are sorted into projections, word embeddings and heads by data flow; globs over names narrow the choice."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ti_fx.errors import SelectionError, did_you_mean
from ti_fx.find.low_rank import low_rank_adapters, makes_weight
from ti_fx.find.walk import CAST, CONVOLUTION, MATMUL, SHAPE, WEIGHT_VIEWS, projection_weight
from ti_fx.find.word_tables import LookUp, other_tables
from ti_fx.ir import roles
from ti_fx.ir.edit import aten_name, tensor
from ti_fx.ir.inserted import reads_weight, weight_quantiser_of
from ti_fx.ir.outputs import model_outputs, named_leaves
from ti_fx.numerics.weight_codes import Granularity

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
_NORMS = frozenset(["layer_norm", "rms_norm", "group_norm"])


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
    return (
        isinstance(value, nn.Parameter) and value.dim() == 2
    ) or value.dtype == torch.uint8  # packed codes


def heads(gm: GraphModule) -> set[Node]:
    """Return the model's heads: parametric ops from which no path to an output meets a further parametric op."""
    # past an intervention the search goes on in the student, as if there were none
    own = roles.twins(gm.graph)
    inputs = {node: [own.get(source, source) for source in node.all_input_nodes] for node in gm.graph.nodes}
    outputs = [own.get(node, node) for node in named_leaves(model_outputs(gm)).values()]
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
    if reads_weight(node):
        return False
    sources = [source for source in node.all_input_nodes if _stored(source)]
    if aten_name(node) == "mul":
        sources = [source for source in sources if source.meta["val"].numel() > 1]
    return bool(sources)


def _stored(node: Node) -> bool:
    while reads_weight(node) or aten_name(node) in WEIGHT_VIEWS:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def word_embeddings(gm: GraphModule, min_rows: int) -> list[Node]:
    """Return the look-ups in tables of words: of at least ``min_rows`` rows, by an integer input of the graph.

    Tables of positions, coordinates and kinds are none, whoever looks them up (``ti_fx.find.word_tables``).
    """
    lookups = _lookups(gm)
    others = _other_tables(gm, lookups)
    return [
        one.node
        for one in lookups
        if one.table not in others and tensor(gm, str(one.table.target)).shape[0] >= min_rows
    ]


def _other_tables(gm: GraphModule, lookups: list[LookUp]) -> dict[Node, str]:
    products = {projection_weight(node) for node in projections(gm)}
    return other_tables(gm, lookups, products.__contains__)


def _lookups(gm: GraphModule) -> list[LookUp]:
    """Return every look-up of a stored table by an integer input."""
    found = []
    for node in gm.graph.nodes:
        if roles.is_student(node) and aten_name(node) == "embedding" and (table := _table(node)) is not None:
            ids, part = _input(node.args[1])
            if ids is not None:
                found.append(LookUp(node, table, ids, part))
    return found


def _table(node: Node) -> Node | None:
    source = node.args[0]
    while isinstance(source, Node) and weight_quantiser_of(source) is not None:
        source = source.args[0]
    return source if isinstance(source, Node) and source.op == "get_attr" else None


def table(node: Node) -> Node:
    """Return the get_attr node of an embedding's table."""
    found = _table(node)
    assert found is not None
    return found


def _input(argument: object) -> tuple[Node | None, int | None]:
    """Return the input that an index is, and which number of its last dimension, None if it is not one of those."""
    node, part = argument, None
    while isinstance(node, Node) and aten_name(node) in _INDEX_OPS:
        tensors = [
            source for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Tensor)
        ]
        source = next(
            (
                source
                for source in tensors
                if not source.meta["val"].dtype.is_floating_point and source.meta["val"].dtype != torch.bool
            ),
            None,
        )
        if source is not None and aten_name(node) == "select":
            _, dim, index = node.args
            if dim in (-1, source.meta["val"].dim() - 1) and isinstance(index, int):
                part = index
        node = source
    return (node, part) if isinstance(node, Node) and node.op == "placeholder" else (None, None)


def skipped(names: Iterable[str], globs: Sequence[str], what: str, option: str = "skip") -> set[str]:
    """Return the parameter names that a glob matches (``*.query.weight``, or a module's path).

    Args:
        names: of the parameters that may be selected.
        globs: the option's value.
        what: what is called so, in an error.
        option: what the user wrote the globs as.

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
            raise SelectionError(
                f"{option}={glob!r} matches no {what}{did_you_mean(glob, _alike(glob, names))}"
            )
        found |= matching
    return found


def _alike(glob: str, names: Sequence[str]) -> list[str]:
    """Return names and module paths; for ``*.a.b``, cut to as many parts, so that near ones look near."""
    paths = list(dict.fromkeys([*names, *(name.rpartition(".")[0] for name in names)]))
    first, *parts = glob.split(".")
    if first != "*" or not parts:
        return paths
    return list(dict.fromkeys(".".join(["*", *path.split(".")[-len(parts) :]]) for path in paths))


@dataclass(frozen=True)
class Fate:
    """What becomes of a stored tensor.

    Attributes:
        granularity: of the scale of its ternary codes, None if it is kept as it is.
        reason: what it is, or why it is kept.
    """

    granularity: Granularity | None
    reason: str


def fates(
    gm: GraphModule,
    *,
    weights: Granularity | None,
    embeddings: Granularity | None,
    head: bool,
    min_rows: int,
    skip: Sequence[str],
) -> dict[Node, Fate]:
    """Return what ``Ternarize`` with these options makes of each floating-point tensor that the student reads.

    By the get_attr node that reads it, in graph order. Of buffers only those that activations are multiplied by.

    Raises:
        SelectionError: a skip glob matches nothing that could be selected.
    """
    kept = set() if head else heads(gm)
    products: dict[Node, list[Node]] = {}
    multiplied = projections(gm)
    adapters = low_rank_adapters(gm, multiplied)
    for node in multiplied:
        if (weight := projection_weight(node)) is not None:
            products.setdefault(weight, []).append(node)
    tables = dict.fromkeys(table(node) for node in word_embeddings(gm, min_rows))
    others = _other_tables(gm, _lookups(gm))
    names = [str(node.target) for node in [*products, *tables]]
    left = skipped(names, skip, "weight that ternarize could select")
    constant = _constant(gm)
    large = (node for node in others if tensor(gm, str(node.target)).shape[0] >= min_rows)
    others = {node: others[node] for node in large}
    constant = _constant(gm)
    found: dict[Node, Fate] = {}
    for node in constant:
        name = str(node.target)
        if (
            node.op != "get_attr"
            or name.startswith(roles.LEARNED_PREFIXES)
            or not tensor(gm, name).is_floating_point()
        ):
            continue
        own = [product for product in products.get(node, ()) if not makes_weight(product, constant)]
        granularity: Granularity | None = None
        if node.target in left:
            reason = "skip"
        elif node in adapters:
            reason = (
                f"low-rank adapter of {adapters[node]}; merged into that first, it becomes ternary with it"
            )
        elif node in tables and embeddings is not None:
            granularity, reason = embeddings, "word embedding" + (", tied to a projection" if own else "")
        elif own and all(product in kept for product in own):
            reason = "head: no parametric operation follows it"
        elif own:
            granularity, reason = weights, "weights=none" if weights is None else "linear projection"
        elif node in tables:
            reason = "embeddings=none"
        else:
            reason = others.get(node) or _why_kept(gm, node, constant, min_rows)
        if reason:
            found[node] = Fate(granularity, reason)
    return found


def _constant(gm: GraphModule) -> dict[Node, None]:
    """Return the student's nodes that are computed from stored tensors alone."""
    found: dict[Node, None] = {}
    for node in gm.graph.nodes:
        sources = node.all_input_nodes
        if roles.is_student(node) and (
            node.op == "get_attr" or (sources and all(source in found for source in sources))
        ):
            found[node] = None
    return found


def _why_kept(gm: GraphModule, node: Node, constant: Mapping[Node, None], min_rows: int) -> str:
    """Say why no rule selects a tensor; nothing of a buffer by which no activation is multiplied.

    1. buffers  2. vectors  3. tables  4. convolutions  5. weights that the graph computes  6. weights of more than two
    dimensions  7. what is added  8. the rest
    """
    value = tensor(gm, str(node.target))
    reads = _reads(node)
    operations = {aten_name(reader) or str(reader.target) for reader, _ in reads}
    is_factor = any(_multiplies(reader, source) for reader, source in reads)
    if not isinstance(value, nn.Parameter):
        return "buffer, which is not trained" if is_factor and value.dim() > 1 else ""
    if value.dim() <= 1:
        if operations & _NORMS:
            return "norm"
        return "bias" if operations & (_LINEAR | CONVOLUTION | {"add"}) else "vector: norm or scale"
    if "embedding" in operations:
        if value.shape[0] < min_rows:
            return f"table of {value.shape[0]} rows; a word embedding has {min_rows} or more"
        return "table not indexed by an input of the graph"
    if operations & CONVOLUTION:
        return "convolution, not a linear projection"
    if any(reader in constant for reader, _ in reads):
        return "a weight is computed from it (weight norm)"
    if value.dim() > 2 and is_factor:
        return f"weights of {value.dim()} dimensions (experts, heads); a linear projection has 2"
    if operations and operations <= {"add", "add_", "cat", "where", "masked_scatter"}:
        return "added to activations or put beside them, not multiplied"
    return f"no linear projection (read by {', '.join(sorted(operations)) or 'nobody'})"


def _multiplies(reader: Node, source: Node) -> bool:
    """Whether a node is a matrix product with a stored tensor, also with those of several experts at once."""
    name = aten_name(reader) or str(reader.target)
    factors = reader.args[1:] if name in ("addmm", "baddbmm") else reader.args
    is_product = name in _LINEAR | MATMUL or "grouped_mm" in name
    return is_product and (source in factors or name == "einsum")


def _reads(node: Node) -> list[tuple[Node, Node]]:
    """Return who computes with a stored tensor, past its quantiser and what only moves it, and what each reads."""
    found: list[tuple[Node, Node]] = []
    queue, seen = [node], {node}
    while queue:
        source = queue.pop()
        for user in source.users:
            moves = reads_weight(user) or aten_name(user) in SHAPE | CAST
            if moves and user.all_input_nodes[0] is source:
                queue += [] if user in seen else [user]
                seen.add(user)
            elif user.op != "output" and roles.is_student(user):
                found.append((user, source))
    return found
