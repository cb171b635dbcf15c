"""``untrained`` lists the Parameters of a prepared graph that training leaves as they are, and why."""

from __future__ import annotations

from torch.fx import GraphModule

from ti_fx.ir.facts import facts
from ti_fx.ir.untrained import Untrained
from ti_fx.ir.untrained import untrained as by_losses
from ti_fx.recipe import Recipe


def untrained(gm: GraphModule, recipe: Recipe | None = None) -> tuple[Untrained, ...]:
    """Return every Parameter of the student that no phase moves, in graph order.

    1. frozen: ``requires_grad`` is False  2. no loss is computed from it  3. the model detaches what it is read for, or
    computes it under ``no_grad``  4. in every phase the teacher's value stands in its place

    Args:
        gm: a prepared graph with losses.
        recipe: whose phases are meant; None: the one that prepared the graph, or where none did, the graph as it is.

    Raises:
        PreconditionError: the graph has no losses.
    """
    recorded = facts(gm).recipe
    if recipe is None and recorded is not None:
        recipe = Recipe.from_dict(recorded)
    return by_losses(gm) if recipe is None else recipe.untrained(gm)
