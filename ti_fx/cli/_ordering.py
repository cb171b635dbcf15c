"""Which passes must run before a pass that a user asks for."""

from __future__ import annotations

from torch.fx import GraphModule

from ti_fx import numerics
from ti_fx.ir import roles
from ti_fx.ir.facts import facts
from ti_fx.ir.pipeline import Pass
from ti_fx.passes import (
    DecomposeAttention,
    Distill,
    DuplicateTeacher,
    Intervene,
    Pack,
    QuantizeActivations,
    Strip,
    Ternarize,
)
from ti_fx.passes.prepare.decompose_attention import fused

# What each pass needs, in the order to run them.
_NEEDS: dict[type[Pass], tuple[type[Pass], ...]] = {
    Ternarize: (),
    DecomposeAttention: (),
    DuplicateTeacher: (),
    QuantizeActivations: (DecomposeAttention, Ternarize),
    Distill: (DecomposeAttention, DuplicateTeacher),
    Intervene: (DecomposeAttention, DuplicateTeacher),
    Strip: (DecomposeAttention, DuplicateTeacher, Ternarize, QuantizeActivations, Distill),
    Pack: (Ternarize, Strip),
}


def parsed(written: str) -> Pass:
    """Return the pass that a user wrote: ``ternarize{weights=row}``; raises RecipeError if there is none such."""
    return Pass.parse(written)


def needed_before(gm: GraphModule, one: Pass) -> list[Pass]:
    """Return the passes, with default options, that ``one`` needs and that have not run on ``gm``."""
    return [kind() for kind in _NEEDS.get(type(one), ()) if not _has_run(gm, kind)]


def _has_run(gm: GraphModule, kind: type[Pass]) -> bool:
    nodes = gm.graph.nodes
    if kind is DecomposeAttention:
        return not fused(gm)
    if kind is DuplicateTeacher:
        return any(roles.is_teacher(node) for node in nodes)
    if kind is Ternarize:
        return any(node.target is numerics.ternary for node in nodes)
    if kind is QuantizeActivations:
        return facts(gm).encoding is not None
    if kind is Distill:
        return any(roles.role(node) == "loss" for node in nodes)
    return kind is Strip and not any(roles.role(node) in ("teacher", "loss") for node in nodes)
