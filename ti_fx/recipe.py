"""A Recipe holds everything needed to rebuild the same training graphs from the same model, as JSON or YAML.

Schedules of the presets are the published ones (arXiv 2302.11812, section 4 and its code): with s = 60 intervention
steps, TI-G intervenes at the output until s/6, at the context until s/3 and at the map to the end; then plain
quantisation-aware training with a fresh optimiser and learning-rate schedule.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.fx import GraphModule

from ti_fx.errors import RecipeError, did_you_mean, first_line
from ti_fx.files import atomic_write
from ti_fx.find.attention import POINTS
from ti_fx.ir import options
from ti_fx.ir.edit import fork
from ti_fx.ir.facts import PREPARE, facts, record_facts
from ti_fx.ir.pipeline import Pass, Pipeline, Report
from ti_fx.ir.untrained import Untrained, untrained
from ti_fx.numerics.encodings import AUTO, ENCODINGS
from ti_fx.passes import (
    DecomposeAttention,
    Distill,
    DuplicateTeacher,
    Intervene,
    QuantizeActivations,
    Ternarize,
)
from ti_fx.passes.prepare.distill import TERMS

FORMAT = 1
INTERVENTION_STEPS = 60


@dataclass(frozen=True)
class Phase:
    """A span of training with one set of interventions.

    Attributes:
        name: shown in logs and reports.
        intervene: where the teacher intervenes; ``Intervene()`` is plain quantisation-aware training.
        steps: optimiser steps: a whole number of them, or a fraction of all of training, between 0 and 1; None: to the
            end of training (the last phase).
        restart: begin with a cleared optimiser state and a new learning-rate schedule.
    """

    name: str
    intervene: Intervene = field(default_factory=Intervene)
    steps: float | None = None
    restart: bool = False

    def __str__(self) -> str:
        length = "to the end" if self.steps is None else f"{self.steps} steps"
        if isinstance(self.steps, float):
            length = f"{100 * self.steps:.3g}% of training"
        return f"{self.name}: {self.intervene}, {length}{', restart' if self.restart else ''}"


@dataclass(frozen=True)
class Recipe:
    """The passes' options and the schedule. Equal recipes on equal models give equal graphs.

    Attributes:
        name: of the method.
        ternarize, activations, distill: options of the prepare passes.
        schedule: the phases, in order.
        steps: optimiser steps in all; None: as TrainingArguments say.
        extra_passes: run after the prepare passes, in order: those of other distributions, for example. A recipe's file
            has them as text: ``["round-weights{bits=4}"]``.
    """

    name: str
    ternarize: Ternarize = field(default_factory=Ternarize)
    activations: QuantizeActivations = field(default_factory=QuantizeActivations)
    distill: Distill = field(default_factory=Distill)
    schedule: tuple[Phase, ...] = (Phase("quantise"),)
    steps: int | None = None
    extra_passes: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no model can be trained by.

        Raises:
            RecipeError: names the phase or option.
        """
        if not self.schedule:
            raise RecipeError(f"recipe {self.name!r} has no phase; give its schedule at least one")
        for phase in self.schedule[:-1]:
            if phase.steps is None:
                raise RecipeError(
                    f"phase {phase.name!r} of recipe {self.name!r} needs steps; only the last may run on"
                )
        interventions: dict[str, Intervene] = {}
        for phase in self.schedule:
            if phase.steps is not None and not _is_length(phase.steps):
                raise RecipeError(
                    f"phase {phase.name!r} of recipe {self.name!r} has {phase.steps} steps; give a whole number of 1 "
                    "or more, or a fraction of training between 0 and 1"
                )
            if interventions.setdefault(phase.name, phase.intervene) != phase.intervene:
                raise RecipeError(
                    f"recipe {self.name!r} has two phases of other interventions called {phase.name!r}; rename one"
                )
            if phase.intervene.at not in (None, *POINTS):
                raise RecipeError(
                    f"phase {phase.name!r} of recipe {self.name!r} can't intervene at {phase.intervene.at!r}"
                    f"{did_you_mean(str(phase.intervene.at), POINTS)}"
                )
        share = sum(phase.steps for phase in self.schedule if isinstance(phase.steps, float))
        if share > 1 + 1e-9:
            raise RecipeError(
                f"the phases of recipe {self.name!r} are {share:g} of training in all; give fractions of at most 1"
            )
        own = {self.activations.encoding} - {AUTO}
        for encoding in (*own, *self.activations.encodings.values()):
            if encoding not in ENCODINGS:
                raise RecipeError(
                    f"recipe {self.name!r} has an unknown encoding {encoding!r}{did_you_mean(encoding, ENCODINGS)}"
                )
        for term in (*TERMS, "task"):
            weight = getattr(self.distill, term)
            if weight is not None and not (math.isfinite(weight) and weight >= 0):
                raise RecipeError(
                    f"recipe {self.name!r}: distill's weight of {term} is {weight}; give 0 or more"
                )

    @staticmethod
    def preset(name: str, *, intervention_steps: float = INTERVENTION_STEPS) -> Recipe:
        """Return a published method: ``ternarybert``, ``ti-o``, ``ti-c``, ``ti-m`` or ``ti-g``.

        Args:
            name: the method.
            intervention_steps: s, the length of the intervened part of training: a whole number of at least 6 optimiser
                steps, or a fraction of all of training, between 0 and 1.

        Raises:
            RecipeError: no such preset (near names are listed), or too few steps.
        """
        if name not in PRESETS:
            raise RecipeError(f"no recipe is called {name!r}{did_you_mean(name, PRESETS)}")
        if not _is_length(intervention_steps) or 1 <= intervention_steps < 6:
            raise RecipeError(
                f"intervention_steps is {intervention_steps}; give at least 6, or a fraction of training "
                "between 0 and 1"
            )
        return Recipe(name, schedule=PRESETS[name](intervention_steps))

    def phases(self) -> tuple[Phase, ...]:
        """Return the phases, in order."""
        return self.schedule

    def passes(self, *, teacher: nn.Module | None = None) -> tuple[Pass, ...]:
        """Return the passes that :meth:`prepare` runs, in order; ``teacher`` as there.

        A recipe of the task's loss alone, without an intervention, needs no teacher and makes none.
        """
        intervenes = any(phase.intervene.at is not None for phase in self.schedule)
        teaches = teacher is not None or intervenes or not self.distill.is_task_alone
        return (
            DecomposeAttention(),
            *((DuplicateTeacher(teacher),) if teaches else ()),
            self.ternarize,
            self.activations,
            self.distill,
            *self.extra_passes,
        )

    def prepare(self, gm: GraphModule, *, teacher: nn.Module | None = None) -> Report:
        """Rewrite a captured graph into student, teacher and losses, without an intervention yet.

        Args:
            gm: from ``ti_fx.capture``.
            teacher: a module to take the teacher's values from; None: the student's own values now.
        """
        before = facts(gm).passes
        report = Pipeline(*self.passes(teacher=teacher))(gm)
        record_facts(gm, recipe=self.to_dict(), passes=(*before, PREPARE))
        return dataclasses.replace(report, untrained=self.untrained(gm))

    def untrained(self, gm: GraphModule) -> tuple[Untrained, ...]:
        """Return the Parameters of a graph that this recipe prepared which no phase of it moves, in graph order."""
        rows = untrained(gm)
        phases = [phase for phase in self.schedule if phase.intervene.at is not None]
        if len(phases) < len(self.schedule):
            return rows  # a phase without an intervention trains whatever is trained in another
        known = {row.name for row in rows}
        left: dict[str, Untrained] | None = None
        for phase in phases:
            intervened = fork(gm)
            Pipeline(phase.intervene)(intervened)
            own = {row.name: row for row in untrained(intervened)}
            left = own if left is None else {name: row for name, row in left.items() if name in own}
        reason = "in every phase the teacher's value stands in its place"
        return tuple(
            row if name in known else dataclasses.replace(row, cause="intervened", reason=reason)
            for name, row in (left or {}).items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        extra = {"extra_passes": [str(one) for one in self.extra_passes]} if self.extra_passes else {}
        return {
            "format": FORMAT,
            "name": self.name,
            "ternarize": _plain(self.ternarize),
            "activations": _plain(self.activations),
            "distill": _plain(self.distill),
            "schedule": [
                {
                    "name": phase.name,
                    "intervene": _plain(phase.intervene),
                    "steps": phase.steps,
                    "restart": phase.restart,
                }
                for phase in self.schedule
            ],
            "steps": self.steps,
            **extra,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Return the recipe that :meth:`to_dict` wrote; options left out keep their defaults.

        Raises:
            RecipeError: an unknown key (near ones are listed) or a value that does not fit; names the place.
        """
        if not isinstance(values, Mapping):
            raise RecipeError(f"{where} holds a {type(values).__name__}; it must hold keys and values")
        known = {"format", *(entry.name for entry in dataclasses.fields(Recipe))}
        for key in values:
            if key not in known:
                raise RecipeError(f"{where} has no key {key!r}{did_you_mean(str(key), known)}")
        if values.get("format", FORMAT) != FORMAT:
            raise RecipeError(f"{where} has format {values['format']!r}; this version reads format {FORMAT}")
        if "name" not in values:
            raise RecipeError(f"{where} has no name; give it one")
        made: dict[str, Any] = {"name": _name(values["name"], where)}
        if values.get("steps") is not None:
            made["steps"] = _steps(values["steps"], where)
        for key, kind in (
            ("ternarize", Ternarize),
            ("activations", QuantizeActivations),
            ("distill", Distill),
        ):
            if key in values:
                made[key] = _construct(kind, values[key], f"{where}.{key}")
        if "schedule" in values:
            made["schedule"] = _schedule(values["schedule"], f"{where}.schedule")
        if "extra_passes" in values:
            made["extra_passes"] = _passes(values["extra_passes"], f"{where}.extra_passes")
        return Recipe(**made)

    def to_yaml(self) -> str:
        """Return the recipe as YAML, as its file has it."""
        written: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return written

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON (``.json``) or YAML (``.yaml``, ``.yml``), atomically.

        Raises:
            RecipeError: another suffix. InputError: the file can't be written.
        """
        if _is_yaml(path):
            atomic_write(path, self.to_yaml())
        else:
            atomic_write(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Read a recipe from a JSON or YAML file.

        Raises:
            RecipeError: the file is missing, can't be read, or holds something else.
        """
        is_yaml = _is_yaml(path)
        try:
            content = Path(path).read_text(encoding="utf-8")
            values = yaml.safe_load(content) if is_yaml else json.loads(content)
        except OSError as error:
            raise RecipeError(f"can't read recipe {path}: {error.strerror or error}") from None
        except (ValueError, yaml.YAMLError) as error:
            kind = "YAML" if is_yaml else "JSON"
            raise RecipeError(f"recipe {path} is not {kind}: {first_line(error)}") from None
        return Recipe.from_dict(values, where=str(path))

    def __str__(self) -> str:
        rows = [
            f"recipe {self.name}",
            *(f"  {one}" for one in (self.ternarize, self.activations, self.distill, *self.extra_passes)),
        ]
        for phase in self.schedule:
            rows.append(f"  {phase}")
        return "\n".join(rows)


def chosen_recipe(written: Recipe | str | Path) -> Recipe:
    """Return a recipe, a preset by its name, or the recipe in a file: whatever has a suffix or a folder is a file.

    Raises:
        RecipeError: no such preset, or the file can't be read.
    """
    if isinstance(written, Recipe):
        return written
    if isinstance(written, Path) or Path(written).suffix or "/" in written:
        return Recipe.load(written)
    return Recipe.preset(written)


def _is_length(steps: Any) -> bool:
    """Return whether a phase may be so long: steps, or a fraction of training."""
    if isinstance(steps, float):
        return 0 < steps < 1
    return isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1


def _one_point(point: str) -> Callable[[float], tuple[Phase, ...]]:
    def schedule(steps: float) -> tuple[Phase, ...]:
        return (Phase(point, Intervene(point), steps), Phase("quantise", restart=True))

    return schedule


def _gradual(steps: float) -> tuple[Phase, ...]:
    sixth, third = (steps / 6, steps / 3) if isinstance(steps, float) else (steps // 6, steps // 3)
    return (
        Phase("output", Intervene("output"), sixth),
        Phase("context", Intervene("context"), third - sixth),
        Phase("map", Intervene("map"), steps - third),
        Phase("quantise", restart=True),
    )


PRESETS: dict[str, Callable[[float], tuple[Phase, ...]]] = {
    "ternarybert": lambda steps: (Phase("quantise"),),
    "ti-o": _one_point("output"),
    "ti-c": _one_point("context"),
    "ti-m": _one_point("map"),
    "ti-g": _gradual,
}


def _plain(value: Any) -> dict[str, Any]:
    """Return a pass's options as JSON values."""
    plain = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    return {name: list(item) if isinstance(item, tuple) else item for name, item in plain.items()}


def _construct(kind: type[Any], values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where} holds {values!r}; it must hold options and values")
    return options.construct(kind, {str(key): value for key, value in values.items()}, where)


def _passes(values: Any, where: str) -> tuple[Pass, ...]:
    if not isinstance(values, list) or not all(isinstance(written, str) for written in values):
        raise RecipeError(f"{where} holds {values!r}; it must be a list of passes as text")
    try:
        return tuple(Pass.parse(written) for written in values)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _schedule(values: Any, where: str) -> tuple[Phase, ...]:
    if not isinstance(values, list):
        raise RecipeError(f"{where} holds {values!r}; it must be a list of phases")
    phases = []
    for index, entry in enumerate(values):
        here = f"{where}[{index}]"
        if not isinstance(entry, Mapping):
            raise RecipeError(f"{here} holds {entry!r}; it must hold a phase's keys")
        fields = dict(entry)
        if "intervene" in fields:
            fields["intervene"] = _construct(Intervene, fields["intervene"], f"{here}.intervene")
        known = {one.name for one in dataclasses.fields(Phase)}
        for key in fields:
            if key not in known:
                raise RecipeError(f"{here} has no key {key!r}{did_you_mean(str(key), known)}")
        if "name" not in fields:
            raise RecipeError(f"{here} has no name; give it one")
        fields["name"] = _name(fields["name"], here)
        if fields.get("steps") is not None and not _is_length(fields["steps"]):
            raise RecipeError(
                f"{here}.steps is {fields['steps']!r}; it must be a whole number of 1 or more, or a fraction of "
                "training between 0 and 1"
            )
        if not isinstance(fields.get("restart", False), bool):
            raise RecipeError(f"{here}.restart is {fields['restart']!r}; it must be true or false")
        phases.append(Phase(**fields))
    return tuple(phases)


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{where}.name is {value!r}; it must be text")
    return value


def _steps(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(f"{where}.steps is {value!r}; it must be a whole number of 1 or more")
    return value


def _is_yaml(path: str | Path) -> bool:
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        raise RecipeError(f"recipe {path} must end in .json, .yaml or .yml")
    return suffix != ".json"
