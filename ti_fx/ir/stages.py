"""The stages that a graph goes through, each with the table of invariants that it keeps there.

==================  ==========================================  =================================
exported            what torch.export returned                  passes/normalise takes it
captured            a plain trainable graph: the student alone  passes/prepare take it
prepared            student, teacher, losses, interventions     passes/prepare and deploy take it
packed              the student alone, its weights as codes     passes/lower take it
lowered             what ONNX can say                           the exporter takes it
made for one phase  a fork of a prepared graph, quick to run    the trainer takes it
==================  ==========================================  =================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from ti_fx.errors import VerificationError
from ti_fx.ir import invariants as rows
from ti_fx.ir.facts import facts
from ti_fx.ir.invariants import Invariant
from ti_fx.ir.shapes import inconsistencies


@dataclass(frozen=True)
class Stage:
    """A stage of a graph.

    Attributes:
        name: as the graph's facts record it.
        advice: how a graph gets there, for people.
        missing: the pass that leads there, as text; None where it takes more than a pass.
        invariants: what every graph in this stage keeps.
    """

    name: str
    invariants: tuple[Invariant, ...]
    missing: str | None = None
    advice: str = ""

    def __str__(self) -> str:
        return self.name


EXPORTED = Stage(
    "exported",
    (rows.TOPOLOGICAL_ORDER, rows.LINT),
    advice="ti_fx.capture runs it, on what torch.export returned",
)
CAPTURED = Stage(
    "captured",
    (
        rows.TOPOLOGICAL_ORDER,
        rows.LINT,
        rows.PLAIN,
        rows.ONE_READ,
        rows.ONE_ROLE,
        rows.ALONE,
        rows.TIED,
        rows.META,
        rows.NO_GUARD,
    ),
    advice="capture the model with ti_fx.capture",
)
PREPARED = Stage(
    "prepared",
    (
        rows.TOPOLOGICAL_ORDER,
        rows.LINT,
        rows.PLAIN,
        rows.ONE_ROLE,
        rows.TEACHER_READS,
        rows.INTERVENTIONS,
        rows.BLENDS,
        rows.TWINS,
        rows.FROZEN,
        rows.TEACHER_DROPOUT,
        rows.QUANTISED_READS,
        rows.PHASED_IN,
        rows.TIED,
        rows.SCALAR_LOSSES,
        rows.MOVED,
        rows.META,
        rows.NO_GUARD,
    ),
    missing="ternarize",
)
PACKED = Stage(
    "packed",
    (
        rows.TOPOLOGICAL_ORDER,
        rows.LINT,
        rows.PLAIN,
        rows.ONE_ROLE,
        rows.ALONE,
        rows.PACKED_WEIGHTS,
        rows.TIED,
        rows.META,
        rows.NO_GUARD,
    ),
    missing="pack",
)
LOWERED = Stage(
    "lowered",
    (
        rows.TOPOLOGICAL_ORDER,
        rows.LINT,
        rows.PLAIN,
        rows.NO_ROLE,
        rows.NOTHING_FOR_TRAINING,
        rows.REAL,
        rows.OPERATORS,
        rows.META,
    ),
    advice="lower it with ti_fx.export.lower",
)
PHASE = Stage(
    "made for one phase",
    (
        rows.TOPOLOGICAL_ORDER,
        rows.LINT,
        rows.PLAIN,
        rows.ONE_ROLE,
        rows.FROZEN,
        rows.TEACHER_DROPOUT,
        rows.QUANTISED_READS,
        rows.PHASED_IN,
        rows.TIED,
        rows.SCALAR_LOSSES,
        rows.MOVED,
        rows.META,
        rows.NO_GUARD,
    ),
    advice="the trainer makes it, of a prepared graph",
)
STAGES: dict[str, Stage] = {
    stage.name: stage for stage in (EXPORTED, CAPTURED, PREPARED, PACKED, LOWERED, PHASE)
}


def stage_of(gm: GraphModule) -> Stage:
    """Return the stage that a graph is in; one that nothing is recorded of counts as captured."""
    return STAGES[facts(gm).stage]


def verify(gm: GraphModule, *, changed: Iterable[Node] | None = None) -> None:
    """Check every invariant of the graph's stage; with ``changed``, meta is re-evaluated for those nodes only.

    Raises:
        VerificationError: names the first broken invariant and the node.
    """
    for invariant in stage_of(gm).invariants:
        for broken in invariant.check(gm):
            raise VerificationError(f"{invariant.name}: {broken}")
    nodes = [node for node in (gm.graph.nodes if changed is None else changed) if node.op != "output"]
    for node in inconsistencies(gm, nodes):
        raise VerificationError(
            f"{rows.META.name}: %{node.name} no longer has the shape or dtype its meta['val'] says; "
            "run the edit in a Pipeline, which refreshes it"
        )


class Progress:
    """Which invariants of a stage hold, while passes lead a graph there: one that held once must hold from then on.

    Args:
        stage: where the passes lead.
        gm: the graph before the first of them.
    """

    def __init__(self, stage: Stage, gm: GraphModule) -> None:
        self.stage = stage
        self.held: set[str] = set()
        self.missing: list[str] = []
        self.check(gm)

    def check(self, gm: GraphModule) -> None:
        """Note what holds now.

        Raises:
            VerificationError: an invariant that held is broken; names it and the node.
        """
        self.missing = []
        for invariant in self.stage.invariants:
            broken = next(invariant.check(gm), None)
            if broken is None:
                self.held.add(invariant.name)
                continue
            self.missing.append(f"{invariant.name}: {broken}")
            if invariant.name in self.held:
                raise VerificationError(self.missing[-1])

    def finish(self) -> None:
        """Refuse a graph that did not get there.

        Raises:
            VerificationError: names the first invariant that does not hold, and the node.
        """
        if self.missing:
            raise VerificationError(f"not yet {self.stage}: {self.missing[0]}")
