"""A trainer refuses a graph in which ternary weights would never train, and says which of them are frozen."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn
from torch.fx import GraphModule

from ti_fx.errors import InputError
from ti_fx.frontend.wrappers import unwrapped
from ti_fx.ir.inserted import quantised_weights
from ti_fx.ir.pipeline import Report
from ti_fx.ir.undo import Undo
from ti_fx.ir.untrained import Cause, Untrained
from ti_fx.recipe import Recipe
from ti_fx.train.source import ready_source

logger = logging.getLogger(__name__)

_WAYS: dict[Cause, str] = {
    "no loss": "keep it in full precision with {skip}, or give a loss that reads it",
    "detached": "keep it in full precision with {skip}",
    "intervened": "add a phase without an intervention, or keep it in full precision with {skip}",
}


def prepare_to_train(gm: GraphModule, recipe: Recipe, teacher: nn.Module | None) -> Report:
    """Prepare a captured graph by a recipe; where that is refused, or weights would never train, it is as before.

    Raises:
        TiFxError: as a pass raises it. InputError: as :func:`require_trained`.
    """
    undo = Undo(gm)
    try:
        if teacher is None:
            report = recipe.prepare(gm)
        else:
            teacher = ready_source(teacher)
            with unwrapped(teacher):
                report = recipe.prepare(gm, teacher=teacher)
        require_trained(gm, recipe)
    except Exception:
        undo()
        raise
    return report


def require_trained(gm: GraphModule, recipe: Recipe) -> None:
    """Refuse ternary weights that no phase trains; say of those that are frozen, and of what else is left as it is.

    Raises:
        InputError: a ternary weight gets no gradient in any phase, or all of them are frozen; names the first, and why.
    """
    rows = recipe.untrained(gm)
    ternary = [row for row in rows if row.is_ternary]
    frozen = [row for row in ternary if row.cause == "frozen"]
    others = [row for row in ternary if row.cause != "frozen"]
    if others:
        first = others[0]
        skip = f"Ternarize(skip=({first.name!r},))"
        raise InputError(
            f"{first.name}{_more(others)} would become ternary and never train: {first.reason} (read by "
            f"{first.reader}); {_WAYS[first.cause].format(skip=skip)}"
        )
    weights = {node.all_input_nodes[0].target for node in quantised_weights(gm)}
    if frozen and len(frozen) == len(weights):
        raise InputError(
            f"all {len(weights)} ternary weights are frozen, {frozen[0].name} for one, so none of them would train; "
            "call requires_grad_(True) on the model (of one with LoRA adapters: merge_and_unload() first)"
        )
    if frozen:
        logger.warning(
            "%s%s: ternary, and frozen (requires_grad is False), so rounded and never trained; call "
            "requires_grad_(True) on it, or keep it in full precision with Ternarize(skip=...)",
            frozen[0].name,
            _more(frozen),
        )
    kept = [row for row in rows if not row.is_ternary]
    if kept:
        logger.info("%s%s: never trained, kept as it is: %s", kept[0].name, _more(kept), kept[0].reason)


def _more(rows: Sequence[Untrained]) -> str:
    return f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
