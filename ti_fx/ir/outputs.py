"""What a graph returns: a model's own output structure, rebuilt inside the graph, or losses beside it."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from ti_fx.errors import CaptureError


def build(graph: Graph, spec: pytree.TreeSpec, leaves: Sequence[Any]) -> Any:
    """Return the structure of ``spec`` over graph nodes, as an argument of the output node.

    Tuples, lists and dicts become literals; mapping dataclasses (transformers' ModelOutput) and named tuples become a
    call of their class with keywords, inserted at the graph's current insertion point.

    Raises:
        CaptureError: a container of another type.
    """
    iterator = iter(leaves)
    return _build(graph, spec, iterator)


def _build(graph: Graph, spec: pytree.TreeSpec, leaves: Iterator[Any]) -> Any:
    if spec.is_leaf():
        return next(leaves)
    children = [_build(graph, child, leaves) for child in spec.children()]
    kind: Any = spec.type
    if kind is None or kind is type(None):
        return None
    if kind in (tuple, list):
        return kind(children)
    if kind in (dict, OrderedDict):
        return dict(zip(spec.context, children, strict=True))
    if kind is namedtuple:  # how a TreeSpec writes any named tuple; its own class is the context
        kind = spec.context
    fields: Any = None
    if issubclass(kind, Mapping) and dataclasses.is_dataclass(kind):
        fields = spec.context
    elif pytree.is_namedtuple_class(kind):
        fields = kind._fields
    if fields is not None:
        keywords = dict(zip(fields, children, strict=True))
        return graph.create_node("call_function", kind, (), keywords, name="outputs")
    raise CaptureError(
        f"the model returns a {kind.__module__}.{kind.__qualname__}, which has no place in a graph; "
        "return tensors, tuples, dicts or a ModelOutput (for a cache, pass use_cache=False)"
    )


def is_container(node: Any) -> bool:
    """Whether a node builds an output structure (a ModelOutput or a named tuple)."""
    return isinstance(node, Node) and node.op == "call_function" and isinstance(node.target, type)


def named_leaves(argument: Any, prefix: str = "") -> dict[str, Node]:
    """Return the tensors of an output structure by name: field names, keys, indices, ``output`` for a lone tensor.

    Nested names are joined by dots: ``hidden_states.0``.
    """
    if is_container(argument):
        return named_leaves(dict(argument.kwargs), prefix)
    if isinstance(argument, Node):
        return {prefix or "output": argument}
    if isinstance(argument, Mapping):
        items: list[tuple[str, Any]] = [(str(key), item) for key, item in argument.items()]
    elif isinstance(argument, tuple | list):
        items = [(str(index), item) for index, item in enumerate(argument)]
    else:
        return {}
    found: dict[str, Node] = {}
    for key, item in items:
        found.update(named_leaves(item, f"{prefix}.{key}" if prefix else key))
    return found


class PreparedResult(NamedTuple):
    """What a graph with losses returns, as a dict of these names.

    Attributes:
        loss: the weighted sum, a scalar.
        losses: each term by name.
        outputs: what the model returns.
        parts: in a graph that is made for one phase, the means that each term is the sum of, by the term's name.
        weights, log_variances: there, what moves the weights of terms, by the term's name.
    """

    loss: Node
    losses: dict[str, Node]
    outputs: Any
    parts: dict[str, tuple[Node, ...]] | None = None
    weights: dict[str, Node] | None = None
    log_variances: dict[str, Node] | None = None

    def structure(self) -> dict[str, Any]:
        """Return the graph's output structure."""
        return {
            name: value for name, value in self._asdict().items() if value is not None or name == "outputs"
        }


def prepared_result(gm: GraphModule) -> PreparedResult | None:
    """Return what a graph with losses returns, None of a graph without."""
    result = gm.graph.output_node().args[0]
    if isinstance(result, dict) and {"loss", "losses", "outputs"} <= set(result) <= set(
        PreparedResult._fields
    ):
        return PreparedResult(**result)
    return None


def model_outputs(gm: GraphModule) -> Any:
    """Return the structure of the model's own outputs, of a graph with losses, too."""
    result = prepared_result(gm)
    return gm.graph.output_node().args[0] if result is None else result.outputs
