"""A Phase is a span of training with one set of interventions; curves move its blends and losses over its steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ti_fx.errors import RecipeError, did_you_mean
from ti_fx.find import points
from ti_fx.ir import options
from ti_fx.ir.pipeline import Pass
from ti_fx.passes import Intervene, PhaseIn, WeighLosses
from ti_fx.passes.prepare.distill import TERMS

TASK = "task"  # the model's own loss, which is no node of the graph
Shape = Literal["constant", "step", "linear", "cosine"]
Order = Literal["at-once", "front-to-back", "back-to-front"]


@dataclass(frozen=True)
class Curve:
    """How the share λ of blended points, or of a loss's own weight, moves over the steps of a phase.

    With u from 0 at ``begin`` to 1 at ``until``, and 0 before, 1 after:

    - ``constant``: λ = ``start``
    - ``step``: λ = ``start`` while u < 1, then ``end``
    - ``linear``: λ = ``start`` + (``end`` - ``start``) · u
    - ``cosine``: λ = ``end`` + (``start`` - ``end``) · (1 + cos(π u)) / 2

    Attributes:
        shape: of the curve.
        start, end: λ before and after, 0 to 1.
        begin, until: steps from the phase's begin, as whole numbers, or fractions of the phase.
        order: all layers at once; or one after the other, each in a part of equal length of the time from ``begin`` to
            ``until``: the layers that are blended, as the graph runs them, or the other way round.
        at: the point that it moves, ``layer+ffn`` for several; None: every one.
        layers, stack: the layers that it moves; None: all. A loss has none, nor ``order`` and ``at``.
    """

    shape: Shape = "linear"
    start: float = 1.0
    end: float = 0.0
    begin: int | float = 0.0
    until: int | float = 1.0
    order: Order = "at-once"
    at: str | None = None
    layers: tuple[int, ...] | None = None
    stack: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is no curve.

        Raises:
            RecipeError: names the option.
        """
        for name, known in (("shape", Shape), ("order", Order)):
            if (value := getattr(self, name)) not in get_args(known):
                raise RecipeError(f"a curve's {name} is {value!r}{did_you_mean(str(value), get_args(known))}")
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"a curve's {name} is {getattr(self, name)}; a share is from 0 to 1")
        for name in ("begin", "until"):
            value = getattr(self, name)
            if not (value >= 0 and (isinstance(value, int) or value <= 1)):
                raise RecipeError(
                    f"a curve's {name} is {value}; give a whole number of steps, or a fraction of the phase from 0 to 1"
                )
        if unknown := points.unknown(self.at):
            raise RecipeError(f"a curve can't move {unknown}")

    def share(self, step: int, steps: int, place: int = 0, places: int = 1) -> float:
        """Return λ at a step.

        Args:
            step: from the phase's begin, 0 for the first.
            steps: of the phase.
            place: of the layer among those that are blended, from the front.
            places: how many are blended.
        """
        if self.shape == "constant":
            return float(self.start)
        begin, until = (
            value if isinstance(value, int) else value * steps for value in (self.begin, self.until)
        )
        if self.order != "at-once":
            turn = place if self.order == "front-to-back" else places - 1 - place
            length = (until - begin) / places
            begin, until = begin + turn * length, begin + (turn + 1) * length
        done = min(max((step - begin) / (until - begin), 0.0), 1.0) if until > begin else float(step >= until)
        if done in (0.0, 1.0):
            return float(self.end if done else self.start)
        if self.shape == "step":
            return float(self.start)
        if self.shape == "cosine":
            return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done

    def moves(self, point: str, stack: int, layer: int) -> bool:
        """Whether it moves the share of a site."""
        return (
            (self.at is None or point in points.names(self.at))
            and (self.layers is None or layer in self.layers)
            and (self.stack is None or stack == self.stack)
        )

    @property
    def is_still(self) -> bool:
        """Whether the share is the same at every step."""
        return self.shape == "constant" or self.start == self.end

    def __str__(self) -> str:
        ends = f"{self.start:g}" if self.is_still else f"{self.start:g} to {self.end:g}"
        limits = "" if (self.begin, self.until) == (0.0, 1.0) else f"from {self.begin} to {self.until}"
        order = "" if self.order == "at-once" else self.order
        layers = "" if self.layers is None else f"layers {', '.join(map(str, self.layers))}"
        said = (f"{self.at or 'share'} {self.shape} {ends}", limits, order, layers)
        return " ".join(part for part in said if part)


@dataclass(frozen=True)
class Phase:
    """A span of training with one set of interventions.

    Attributes:
        name: shown in logs and reports.
        intervene: where the teacher intervenes; ``Intervene()`` is plain quantisation-aware training.
        steps: optimiser steps: a whole number of them, or a fraction of all of training, between 0 and 1; None: to the
            end of training (the last phase).
        restart: begin with a cleared optimiser state and a new learning-rate schedule.
        curves: how the shares of blended points move, of each the first curve that moves it. They need
            ``Intervene(blend=...)``, which needs them.
        weights: how the weights of losses move, by Distill's names of them: each is the recipe's own weight times the
            curve. A loss without a curve keeps its weight.
        phase_in: how the share of their quantised values moves that weights are read by; None: they are quantised.
    """

    name: str
    intervene: Intervene = field(default_factory=Intervene)
    steps: float | None = None
    restart: bool = False
    curves: tuple[Curve, ...] = ()
    weights: Mapping[str, Curve] = field(default_factory=dict)
    phase_in: Curve | None = None

    def passes(self) -> tuple[Pass, ...]:
        """Return what makes this phase's graph of a prepared one."""
        weighed = tuple(term for term in self.weights if term != TASK)
        further = (*((PhaseIn(),) if self.phase_in else ()), *((WeighLosses(weighed),) if weighed else ()))
        return (self.intervene, *further)

    @property
    def moves(self) -> bool:
        """Whether anything follows a curve."""
        return bool(self.curves or self.weights or self.phase_in)

    def single_curves(self) -> list[tuple[str, Curve]]:
        """Return the curves of what has no layers, each with what that is."""
        found = [(f"weight of {term}", curve) for term, curve in self.weights.items()]
        return found if self.phase_in is None else [*found, ("share of quantised weights", self.phase_in)]

    def trained_by(self) -> Intervene:
        """Return what gradients see of the interventions: of shares that are 1, or 0, all along, no blend."""
        if not self.curves or not all(curve.is_still for curve in self.curves):
            return self.intervene
        shares = {curve.start for curve in self.curves}
        if shares == {1.0}:
            return dataclasses.replace(self.intervene, blend=False)
        return Intervene() if shares == {0.0} else self.intervene

    def to_dict(self) -> dict[str, Any]:
        """Return the phase as JSON values."""
        intervene = plain(self.intervene)
        if not self.intervene.blend:
            del intervene["blend"]  # as it was written before there were blends
        written: dict[str, Any] = {
            "name": self.name,
            "intervene": intervene,
            "steps": self.steps,
            "restart": self.restart,
        }
        if self.curves:
            written["curves"] = [plain(curve) for curve in self.curves]
        if self.weights:
            written["weights"] = {term: plain(curve) for term, curve in self.weights.items()}
        if self.phase_in is not None:
            written["phase_in"] = plain(self.phase_in)
        return written

    def __str__(self) -> str:
        length = "to the end" if self.steps is None else f"{self.steps} steps"
        if isinstance(self.steps, float):
            length = f"{100 * self.steps:.3g}% of training"
        curves = "".join(f", {curve}" for curve in self.curves)
        for what, curve in self.single_curves():
            curves += f", {what} {str(curve).removeprefix('share ')}"
        return f"{self.name}: {self.intervene}, {length}{', restart' if self.restart else ''}{curves}"


def check_phases(phases: Sequence[Phase], recipe: str) -> None:
    """Refuse phases that no model can be trained by.

    Args:
        phases: in order.
        recipe: the recipe's name, for the message.

    Raises:
        RecipeError: names the phase.
    """
    if not phases:
        raise RecipeError(f"recipe {recipe!r} has no phase; give its schedule at least one")
    for phase in phases[:-1]:
        if phase.steps is None:
            raise RecipeError(
                f"phase {phase.name!r} of recipe {recipe!r} needs steps; only the last may run on"
            )
    known: dict[str, Phase] = {}
    for phase in phases:
        _check_phase(phase, f"phase {phase.name!r} of recipe {recipe!r}")
        if known.setdefault(phase.name, phase).passes() != phase.passes():
            raise RecipeError(
                f"recipe {recipe!r} has two phases of other interventions called {phase.name!r}; rename one"
            )
    share = sum(phase.steps for phase in phases if isinstance(phase.steps, float))
    if share > 1 + 1e-9:
        raise RecipeError(
            f"the phases of recipe {recipe!r} are {share:g} of training in all; give fractions of at most 1"
        )


def _check_phase(phase: Phase, where: str) -> None:
    if phase.steps is not None and not is_length(phase.steps):
        raise RecipeError(
            f"{where} has {phase.steps} steps; give a whole number of 1 or more, or a fraction of training between 0 "
            "and 1"
        )
    if unknown := points.unknown(phase.intervene.at):
        raise RecipeError(f"{where} can't intervene at {unknown}")
    if phase.intervene.blend and phase.intervene.at is None:
        raise RecipeError(f"{where} blends at no point; give intervene: at")
    if phase.intervene.blend and not phase.curves:
        raise RecipeError(f"{where} blends, and no curve moves its shares; give curves: [{{shape: linear}}]")
    if phase.curves and not phase.intervene.blend:
        raise RecipeError(f"{where} has curves and blends nothing; give intervene: blend: true")
    for term in phase.weights:
        if term not in (*TERMS, TASK):
            raise RecipeError(f"{where} weighs no loss called {term!r}{did_you_mean(term, (*TERMS, TASK))}")
    for what, curve in phase.single_curves():
        if curve != Curve(curve.shape, curve.start, curve.end, curve.begin, curve.until):
            raise RecipeError(f"{where}: the {what} has no layers; leave out order, at, layers and stack")
    named = points.names(phase.intervene.at)
    for curve in phase.curves:
        for point in points.names(curve.at):
            if point not in named:
                raise RecipeError(
                    f"{where} has a curve for {point!r}, and intervenes at {phase.intervene.at!r}"
                )


def is_length(steps: Any) -> bool:
    """Return whether a phase may be so long: steps, or a fraction of training."""
    if isinstance(steps, float):
        return 0 < steps < 1
    return isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1


def plain(value: Any) -> dict[str, Any]:
    """Return the options of a pass or a curve as JSON values."""
    found = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value) if entry.compare}
    return {name: list(item) if isinstance(item, tuple) else item for name, item in found.items()}


def constructed(kind: type[Any], values: Any, where: str) -> Any:
    """Return what :func:`plain` wrote.

    Raises:
        RecipeError: an unknown option or a value that does not fit; names the place.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where} holds {values!r}; it must hold options and values")
    return options.construct(kind, {str(key): value for key, value in values.items()}, where)


def read_phases(values: Any, where: str) -> tuple[Phase, ...]:
    """Return the phases of a recipe's JSON values.

    Raises:
        RecipeError: an unknown key (near ones are listed) or a value that does not fit; names the place.
    """
    if not isinstance(values, list):
        raise RecipeError(f"{where} holds {values!r}; it must be a list of phases")
    return tuple(_read_phase(entry, f"{where}[{index}]") for index, entry in enumerate(values))


def _read_phase(entry: Any, where: str) -> Phase:
    if not isinstance(entry, Mapping):
        raise RecipeError(f"{where} holds {entry!r}; it must hold a phase's keys")
    fields = dict(entry)
    if "intervene" in fields:
        fields["intervene"] = constructed(Intervene, fields["intervene"], f"{where}.intervene")
    known = {one.name for one in dataclasses.fields(Phase)}
    for key in fields:
        if key not in known:
            raise RecipeError(f"{where} has no key {key!r}{did_you_mean(str(key), known)}")
    if "name" not in fields:
        raise RecipeError(f"{where} has no name; give it one")
    fields["name"] = read_name(fields["name"], where)
    if fields.get("steps") is not None and not is_length(fields["steps"]):
        raise RecipeError(
            f"{where}.steps is {fields['steps']!r}; it must be a whole number of 1 or more, or a fraction of "
            "training between 0 and 1"
        )
    if not isinstance(fields.get("restart", False), bool):
        raise RecipeError(f"{where}.restart is {fields['restart']!r}; it must be true or false")
    if "curves" in fields:
        fields["curves"] = _read_curves(fields["curves"], f"{where}.curves")
    if "weights" in fields:
        fields["weights"] = _read_weights(fields["weights"], f"{where}.weights")
    if fields.get("phase_in") is not None:
        fields["phase_in"] = _read_curve(fields["phase_in"], f"{where}.phase_in")
    return Phase(**fields)


def _read_curves(values: Any, where: str) -> tuple[Curve, ...]:
    if not isinstance(values, list):
        raise RecipeError(f"{where} holds {values!r}; it must be a list of curves")
    return tuple(_read_curve(entry, f"{where}[{index}]") for index, entry in enumerate(values))


def _read_weights(values: Any, where: str) -> dict[str, Curve]:
    if not isinstance(values, Mapping):
        raise RecipeError(
            f"{where} holds {values!r}; it must hold a curve for each loss: {{logits: {{shape: linear}}}}"
        )
    return {str(term): _read_curve(entry, f"{where}.{term}") for term, entry in values.items()}


def _read_curve(entry: Any, where: str) -> Curve:
    try:
        made: Curve = constructed(Curve, entry, where)
    except RecipeError as error:
        said = str(error)
        raise RecipeError(said if said.startswith(where) else f"{where}: {said}") from None
    return made


def read_name(value: Any, where: str) -> str:
    """Return a name.

    Raises:
        RecipeError: it is no text.
    """
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{where}.name is {value!r}; it must be text")
    return value
