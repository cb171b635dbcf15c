"""A gradient is followed from the losses back to the student's Parameters; those that it does not reach never train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ti_fx import numerics
from ti_fx.errors import PreconditionError
from ti_fx.ir import roles
from ti_fx.ir.edit import aten_name, origin, stored, written_arguments
from ti_fx.ir.facts import facts
from ti_fx.ir.inserted import weight_quantiser_of
from ti_fx.ir.outputs import model_outputs, named_leaves, prepared_result
from ti_fx.ir.shapes import OF_SHAPES
from ti_fx.ir.text import where

Cause = Literal["frozen", "no loss", "detached", "intervened"]
SHOWN = 10  # rows of ternary weights in a report
Mark = TypeVar("Mark")

# Of these the derivative is zero, or there is none: what they read gets no gradient through them.
_STOPS = OF_SHAPES | {
    "detach",
    "detach_",
    "sign",
    "sgn",
    "round",
    "floor",
    "ceil",
    "trunc",
    "floor_divide",
    "heaviside",
}


@dataclass(frozen=True)
class Untrained:
    """A Parameter that no step of training moves.

    Attributes:
        name: of the Parameter.
        is_ternary: whether the student reads it through a ternary quantiser: then it is rounded, and never adapts.
        cause: ``frozen`` (``requires_grad`` is False), ``no loss`` (none is computed from it), ``detached`` (the model
            computes what it is read for without a gradient), ``intervened`` (the teacher's value stands in its place
            in every phase).
        reason: the cause, in words, with the node or the output.
        reader: the node that reads it, and its module.
    """

    name: str
    is_ternary: bool
    cause: Cause
    reason: str
    reader: str

    def __str__(self) -> str:
        kind = "ternary" if self.is_ternary else "in full precision"
        return f"{self.name} ({kind}, read by {self.reader}): {self.reason}"


def table(rows: Sequence[Untrained]) -> list[str]:
    """Return the rows as lines for a report: each ternary weight, and the others in one line."""
    ternary = [row for row in rows if row.is_ternary]
    others = [row for row in rows if not row.is_ternary]
    lines = [f"never trained: {row}" for row in ternary[:SHOWN]]
    if len(ternary) > SHOWN:
        lines.append(
            f"never trained: {len(ternary) - SHOWN} more ternary weights, {ternary[SHOWN].name} for one"
        )
    if others:
        more = f" and {len(others) - 1} more in full precision" if len(others) > 1 else ""
        lines.append(f"never trained: {others[0]}{more}")
    return lines


def untrained(gm: GraphModule) -> tuple[Untrained, ...]:
    """Return the student's Parameters that the losses of a prepared graph leave as they are, in graph order.

    Where the recipe weighs the task's loss, every output counts as reached by it.

    Raises:
        PreconditionError: the graph has no losses.
    """
    ends = list(_ends(gm))
    if not ends:
        raise PreconditionError("nothing trains in a graph without losses", missing="distill")
    writes = _writes(gm)
    reached, followed = _upstream(ends, writes), _upstream(ends, writes, past_stops=True)
    stop = _nearest(gm, {node: node for node in followed if _stops(node)})
    output = _nearest(gm, {node: name for name, node in named_leaves(model_outputs(gm)).items()})
    found: dict[str, Untrained] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = stored(gm, node)
        if not roles.is_student(node) or not isinstance(value, nn.Parameter):
            continue
        if not value.requires_grad:
            found[node.target] = _row(node, "frozen", "it is frozen (requires_grad is False)")
        elif node in followed and node not in reached:
            which = f"%{stop[node].name}" if node in stop else "the model"
            reason = f"{which} stops its gradient (detach or no_grad in the model)"
            found[node.target] = _row(node, "detached", reason)
        elif node not in reached:
            leads = f"it leads to the output {output[node]!r}, which no loss reads" if node in output else ""
            found[node.target] = _row(node, "no loss", leads or "no loss is computed from it")
    return tuple(found.values())


def _row(node: Node, cause: Cause, reason: str) -> Untrained:
    quantiser = next((user for user in node.users if weight_quantiser_of(user) is not None), None)
    reader = next(iter((quantiser or node).users), node)
    is_ternary = quantiser is not None and quantiser.args[0] is node  # what a quantiser learns is no weight
    return Untrained(str(node.target), is_ternary, cause, reason, where(reader))


def _ends(gm: GraphModule) -> Iterator[Node]:
    """Yield what is differentiated: the weighted sum, and the outputs where a loss on labels is added."""
    result = prepared_result(gm)
    if result is not None:
        yield result.loss
    if facts(gm).task:
        yield from named_leaves(model_outputs(gm)).values()


def _writes(gm: GraphModule) -> dict[Node, list[Node]]:
    """Return the nodes that write in place, by what made the tensor that they write into."""
    found: dict[Node, list[Node]] = {}
    for node in gm.graph.nodes:
        for written in written_arguments(node):
            found.setdefault(origin(written), []).append(node)
    return found


def _upstream(
    ends: Iterable[Node], writes: Mapping[Node, list[Node]], *, past_stops: bool = False
) -> set[Node]:
    """Return the nodes that a gradient of ``ends`` reaches, along what is computed and what is written in place."""
    seen: set[Node] = set()
    queue = list(ends)
    while queue:
        node = queue.pop()
        if node in seen or not _has_gradient(node):
            continue
        seen.add(node)
        queue += writes.get(origin(node), ()) if writes else ()
        if past_stops or not _stops(node):
            queue += node.all_input_nodes
    return seen


def _nearest(gm: GraphModule, marks: Mapping[Node, Mark]) -> dict[Node, Mark]:
    """Return, of each node from which a marked one is computed, the mark that comes first on one of the ways."""
    found: dict[Node, Mark] = dict(marks)
    for node in reversed(gm.graph.nodes):
        if node in found:
            for source in node.all_input_nodes:
                found.setdefault(source, found[node])
    return found


def _stops(node: Node) -> bool:
    """Whether a node passes no gradient to what it reads."""
    return node.target is numerics.detach or aten_name(node) in _STOPS


def _has_gradient(node: Node) -> bool:
    """Whether a gradient can be taken of a value: numbers, masks and the frozen teacher have none."""
    value = node.meta.get("val")
    if roles.is_teacher(node):
        return False
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return not isinstance(value, int | torch.SymInt | torch.SymBool)
