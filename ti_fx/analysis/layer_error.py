"""``layer_errors`` measures on one batch how far each block of the student is from its full-precision teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ti_fx.errors import InputError
from ti_fx.find.attention import POINTS, find_attention, streams
from ti_fx.ir import roles
from ti_fx.ir.edit import fork, mode
from ti_fx.ir.pipeline import Pipeline
from ti_fx.numerics.closeness import relative
from ti_fx.passes import Intervene

LAYER_OUTPUT = "layer output"


@dataclass(frozen=True)
class LayerError:
    """One value of one layer: ``relative_error`` = ||student - teacher|| / ||teacher||, over all entries that count.

    Attributes:
        stack, layer: as in AttentionSite; layer -1 is what enters the first layer.
        kind: ``self`` or ``cross`` for values of that attention block, ``layer`` for the layer's output.
        point: ``map``, ``context``, ``output`` or ``layer output``.
        relative_error: 0 is exact; 1 is as wrong as a zero student.
    """

    stack: int
    layer: int
    kind: str
    point: str
    relative_error: float


@dataclass(frozen=True)
class _Value:
    stack: int
    layer: int
    kind: str
    point: str
    node: Node


def layer_errors(
    student: GraphModule,
    batch: Mapping[str, Tensor],
    *,
    reference: GraphModule | None = None,
    tokens: Tensor | None = None,
) -> list[LayerError]:
    """Compare map, context, output and layer output of every layer, in eval mode, without interventions or gradients.

    Args:
        student: a prepared graph, compared with its own teacher; or, with ``reference``, a stripped or packed one.
        batch: the graph's inputs by name.
        reference: the full-precision graph of the same model.
        tokens: None, or ``(batch, tokens)`` with nonzero where a token counts (an attention mask): other tokens are
            left out of every value that has these two dimensions.

    Returns:
        A row a value, in the order of execution within a stack.

    Raises:
        InputError: there is no teacher and no reference, or the two graphs have different attention blocks.
    """
    if reference is None:
        return _against_teacher(student, batch, tokens)
    left, right = list(_values(student)), list(_values(reference))
    if [_key(value) for value in left] != [_key(value) for value in right]:
        raise InputError(
            f"student and reference are graphs of different models: {len(left)} values against {len(right)}; "
            "capture both from the same model"
        )
    ours, theirs = _run(student, batch, left), _run(reference, batch, right)
    return [_row(one, ours[one.node], theirs[two.node], tokens) for one, two in zip(left, right, strict=True)]


def _against_teacher(
    student: GraphModule, batch: Mapping[str, Tensor], tokens: Tensor | None
) -> list[LayerError]:
    teacher = roles.twin_of(student.graph)
    if not teacher:
        raise InputError(
            "the graph has no teacher to compare with; run duplicate-teacher, or give reference="
        )
    if any(roles.fact(node, "intervened") for node in student.graph.nodes):
        student = fork(student)
        Pipeline(Intervene())(student)
        teacher = roles.twin_of(student.graph)
    pairs = [value for value in _values(student) if value.node in teacher]
    twins = [_Value(*_key(value), teacher[value.node]) for value in pairs]
    found = _run(student, batch, [*pairs, *twins])
    return [_row(one, found[one.node], found[teacher[one.node]], tokens) for one in pairs]


def _values(gm: GraphModule) -> Iterator[_Value]:
    sites = find_attention(gm)
    for stack, stream in streams(gm, sites).items():
        tower = [site for site in sites if site.stack == stack]
        for layer in sorted({site.layer for site in tower}):
            for site in (site for site in tower if site.layer == layer):
                for point in POINTS:
                    if (node := site.at(point)) is not None:
                        yield _Value(stack, layer, site.kind, point, node)
            if layer + 1 < len(stream):
                yield _Value(stack, layer, "layer", LAYER_OUTPUT, stream[layer + 1])


def _key(value: _Value) -> tuple[int, int, str, str]:
    return value.stack, value.layer, value.kind, value.point


class _Recorder(Interpreter):
    """Runs the graph node by node and keeps the values of some nodes."""

    def __init__(self, gm: GraphModule, wanted: set[Node]) -> None:
        super().__init__(gm)
        self.wanted = wanted
        self.found: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        if n in self.wanted:
            self.found[n] = result
        return result


def _run(gm: GraphModule, batch: Mapping[str, Tensor], values: list[_Value]) -> dict[Node, Tensor]:
    inputs = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
    missing = [name for name in inputs if name not in batch]
    if missing:
        raise InputError(f"the batch lacks {', '.join(missing)}; the graph's inputs are {', '.join(inputs)}")
    recorder = _Recorder(gm, {value.node for value in values})
    with torch.no_grad(), mode(gm, training=False):
        recorder.run(*(batch[name] for name in inputs), enable_io_processing=False)
    return recorder.found


def _row(value: _Value, student: Tensor, teacher: Tensor, tokens: Tensor | None) -> LayerError:
    student, teacher = _counting(student, tokens), _counting(teacher, tokens)
    return LayerError(*_key(value), relative_error=relative(student, teacher))


def _counting(value: Tensor, tokens: Tensor | None) -> Tensor:
    """Return the entries at tokens that count, for ``(batch, ..., tokens, size)``; other shapes are kept whole."""
    if tokens is None or value.dim() < 3 or (value.shape[0], value.shape[-2]) != tuple(tokens.shape):
        return value
    return value.movedim(-2, 1)[tokens != 0]
