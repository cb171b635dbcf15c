"""``layer_errors`` measures on one batch how far each block of the student is from its full-precision teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from ti_fx.analysis.recorded import Recorder, run, with_teacher
from ti_fx.errors import InputError
from ti_fx.find.attention import POINTS, find_attention, streams
from ti_fx.ir import roles
from ti_fx.numerics.closeness import relative

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
    student = with_teacher(student)
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


def _run(gm: GraphModule, batch: Mapping[str, Tensor], values: list[_Value]) -> dict[Node, Tensor]:
    recorder = Recorder(gm, (value.node for value in values))
    run(recorder, batch)
    return recorder.found


def _row(value: _Value, student: Tensor, teacher: Tensor, tokens: Tensor | None) -> LayerError:
    student, teacher = _counting(student, tokens), _counting(teacher, tokens)
    return LayerError(*_key(value), relative_error=relative(student, teacher))


def _counting(value: Tensor, tokens: Tensor | None) -> Tensor:
    """Return the entries at tokens that count, for ``(batch, ..., tokens, size)``; other shapes are kept whole."""
    if tokens is None or value.dim() < 3 or (value.shape[0], value.shape[-2]) != tuple(tokens.shape):
        return value
    return value.movedim(-2, 1)[tokens != 0]
