"""A learned step starts from the values that it will round, on the example of the capture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ti_fx.errors import PreconditionError
from ti_fx.ir import roles
from ti_fx.ir.edit import erase, get_attr, mode, register
from ti_fx.ir.facts import facts
from ti_fx.ir.run_by_need import RunByNeed
from ti_fx.numerics.quantiser import Quantiser

Rounded = tuple[Node, Quantiser]  # a value, and a quantiser that rounds it


def first_steps(gm: GraphModule, rounded: Iterable[Rounded]) -> dict[Rounded, Tensor]:
    """Return the first step of each value whose quantiser learns one, ``()``.

    Raises:
        PreconditionError: the graph keeps no example, or its tensors have no values.
    """
    wanted = [one for one in dict.fromkeys(rounded) if one[1].start is not None]
    if not wanted:
        return {}
    example, stored = facts(gm).example, next(gm.parameters())
    if example is None or stored.is_meta:
        lacks = "keeps no example" if example is None else "is on the meta device"
        raise PreconditionError(
            f"quantize-activations starts learned steps from values on the example, and the graph {lacks}; capture a "
            "model that has values with ti_fx.capture"
        )
    found: dict[Rounded, Tensor] = {}

    def see(values: Mapping[Node, Any]) -> None:
        for source, quantiser in wanted:
            assert quantiser.start is not None
            found[source, quantiser] = quantiser.start(values[source])

    sources = list(dict.fromkeys(source for source, _ in wanted))
    batch = {name: value.to(stored.device) for name, value in example.items()}
    with mode(gm, False):
        RunByNeed(gm, [batch], sources).visit(sources, see)
    return found


def read_step(gm: GraphModule, before: Node, quantiser: str, first: Tensor) -> Node:
    """Give a quantiser's node, called so, a Parameter of its own; return the node that reads it."""
    target = f"{roles.ACTIVATION_QUANT}.{quantiser}.step"
    register(gm, target, nn.Parameter(first.clone()))
    return get_attr(before, target, f"{quantiser}_step", "student")


def erase_quantiser(node: Node) -> bool:
    """Erase a fake-quantiser without readers and the step that it alone reads; return whether there was one."""
    learned = steps_of(node)
    erase(node)
    erase_unread(learned)
    return bool(learned)


def steps_of(node: Node) -> list[Node]:
    """Return the reads of what a fake-quantiser learns."""
    return [one for one in node.args[1:] if isinstance(one, Node)]


def erase_unread(steps: Iterable[Node]) -> None:
    """Erase the reads of steps that no fake-quantiser reads any more."""
    for one in steps:
        if not one.users:
            erase(one)
