"""What a phase's curves move is a function of the optimiser step, on every device the same: blends and losses."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule

from ti_fx.errors import RecipeError
from ti_fx.ir.blends import Share, set_shares, shares
from ti_fx.ir.moved import set_weights
from ti_fx.ir.phased import set_share
from ti_fx.phases import TASK, Curve, Phase

TASK_SHARE = f"share_{TASK}"  # in logs: of the weight that the recipe gives the task's loss


def shares_at(phase: Phase, sites: Sequence[Share], step: int, steps: int) -> dict[str, float]:
    """Return the share of each blended site at a step of a phase, by the tap's name.

    Args:
        phase: with its curves.
        sites: what its graph blends, as the graph runs it.
        step: from the phase's begin.
        steps: of the phase.

    Raises:
        RecipeError: no curve moves a site, or a curve moves none; names it.
    """
    moved: dict[str, Curve] = {}
    for site in sites:
        own = [one for one in phase.curves if one.moves(site.point, site.stack, site.layer)]
        if not own:
            raise RecipeError(
                f"phase {phase.name!r} has no curve for %{site.tap} ({site.point}, stack {site.stack}, layer "
                f"{site.layer}); give one without at and layers"
            )
        moved[site.tap] = own[0]
    for curve in phase.curves:
        if curve not in moved.values():
            raise RecipeError(f"phase {phase.name!r} has a curve that moves nothing: {curve}; leave it out")
    found = {}
    for site in sites:
        curve = moved[site.tap]
        layers = list(dict.fromkeys((one.stack, one.layer) for one in sites if moved[one.tap] is curve))
        place = layers.index((site.stack, site.layer))
        found[site.tap] = curve.share(step, steps, place, len(layers))
    return found


def move_shares(gm: GraphModule, phase: Phase, step: int, steps: int) -> dict[str, float]:
    """Write the shares of a step into a phase's graph; return the mean share of each point.

    Raises:
        RecipeError: as :func:`shares_at`.
    """
    sites = shares(gm)
    if not sites:
        return {}
    values = shares_at(phase, sites, step, steps)
    set_shares(gm, values)
    by_point: dict[str, list[float]] = {}
    for site in sites:
        by_point.setdefault(site.point, []).append(values[site.tap])
    return {point: sum(own) / len(own) for point, own in by_point.items()}


def move(gm: GraphModule, phase: Phase, step: int, steps: int) -> dict[str, float]:
    """Write all that a phase's curves move at a step into its graph; return it by the names of logs.

    The task's loss is no node of the graph: its share is returned alone, as ``share_task``.

    Raises:
        RecipeError: as :func:`shares_at`.
    """
    moved = {f"blend_{point}": share for point, share in move_shares(gm, phase, step, steps).items()}
    if phase.phase_in is not None:
        moved["phase_in"] = phase.phase_in.share(step, steps)
        set_share(gm, moved["phase_in"])
    curves = {term: curve.share(step, steps) for term, curve in phase.weights.items()}
    moved |= {f"weight_{term}": value for term, value in set_weights(gm, curves).items()}
    return moved | ({TASK_SHARE: curves[TASK]} if TASK in curves else {})
