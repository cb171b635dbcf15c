"""A Recipe holds everything needed to rebuild the same training graphs from the same model, as JSON or YAML."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.fx import GraphModule

from ti_fx.errors import RecipeError, did_you_mean, first_line
from ti_fx.files import atomic_write
from ti_fx.ir.edit import fork
from ti_fx.ir.facts import PREPARE, facts, record_facts
from ti_fx.ir.pipeline import Pass, Pipeline, Report
from ti_fx.ir.untrained import Untrained, untrained
from ti_fx.numerics.encodings import AUTO, ENCODINGS
from ti_fx.passes import (
    Calibrate,
    DecomposeAttention,
    Distill,
    DuplicateTeacher,
    KeepLayers,
    QuantizeActivations,
    Ternarize,
)
from ti_fx.passes.prepare.distill import TERMS
from ti_fx.phases import (
    TASK,
    Curve,
    Phase,
    check_phases,
    constructed,
    is_length,
    plain,
    read_name,
    read_phases,
)
from ti_fx.presets import DEFAULT, PRESETS

__all__ = ["DEFAULT", "PRESETS", "Curve", "Phase", "Recipe", "chosen_recipe"]

FORMAT = 1
FEWEST = 6  # steps that a preset's interventions fit into


@dataclass(frozen=True)
class Recipe:
    """The passes' options and the schedule. Equal recipes on equal models give equal graphs.

    Attributes:
        name: of the method.
        ternarize, activations, distill: options of the prepare passes.
        keep_layers: which layers the student has; None: all of its teacher's.
        calibrate: how a trainer sets the ternary weights by rows of its data before the first step; None: they are the
            teacher's, rounded. A start of the student's own (other weights than the teacher's) is left as it is.
        teachers: of a chain, the recipes whose students come before: each is the next one's teacher, and what that
            one's student begins with (``ti_fx.train.trainers``).
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
    keep_layers: KeepLayers | None = None
    calibrate: Calibrate | None = None
    teachers: tuple[Recipe, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no model can be trained by.

        Raises:
            RecipeError: names the phase or option.
        """
        check_phases(self.schedule, self.name)
        own = {self.activations.encoding} - {AUTO}
        for encoding in (*own, *self.activations.encodings.values()):
            if encoding not in ENCODINGS:
                raise RecipeError(
                    f"recipe {self.name!r} has an unknown encoding {encoding!r}{did_you_mean(encoding, ENCODINGS)}"
                )
        self._check_losses()
        for one in self.teachers:
            if one.teachers or one.keep_layers is not None:
                raise RecipeError(
                    f"recipe {self.name!r}: {one.name!r} among its teachers must be of one stage, and have all layers"
                )

    def _check_losses(self) -> None:
        for term in (*TERMS, TASK):
            weight = getattr(self.distill, term)
            if weight is not None and not (math.isfinite(weight) and weight >= 0):
                raise RecipeError(
                    f"recipe {self.name!r}: distill's weight of {term} is {weight}; give 0 or more"
                )
            learned = term in self.distill.learned
            moved = [phase.name for phase in self.schedule if term in phase.weights]
            if moved and learned:
                raise RecipeError(
                    f"recipe {self.name!r}: the weight of {term} is learned, and phase {moved[0]!r} moves it; leave "
                    "one of both out"
                )
            if (moved or learned) and weight == 0:
                raise RecipeError(
                    f"recipe {self.name!r}: the weight of {term} can't move, as it is 0; give distill: {term}"
                )
        for term in self.distill.learned:
            if term not in TERMS:
                hint = "" if term == TASK else did_you_mean(term, TERMS)
                raise RecipeError(f"recipe {self.name!r}: distill can't learn the weight of {term!r}{hint}")

    @staticmethod
    def preset(name: str, *, intervention_steps: float | None = None) -> Recipe:
        """Return a method by its name: ``ternarybert``, ``ti-o``, ``ti-c``, ``ti-m``, ``ti-g`` or another of PRESETS.

        Args:
            name: the method; what it does and where it is from is in ``ti_fx.recipe.PRESETS``.
            intervention_steps: s, the length of the intervened part of training: a whole number of at least 6 optimiser
                steps, or a fraction of all of training, between 0 and 1. None: the preset's own (60 steps as
                published). Where nothing intervenes it is not used.

        Raises:
            RecipeError: no such preset (near names are listed), or too few steps.
        """
        if name not in PRESETS:
            raise RecipeError(f"no recipe is called {name!r}{did_you_mean(name, PRESETS)}")
        preset = PRESETS[name]
        steps = intervention_steps if intervention_steps is not None else preset.length or FEWEST
        if not is_length(steps) or 1 <= steps < FEWEST:
            raise RecipeError(
                f"intervention_steps is {steps}; give at least {FEWEST}, or a fraction of training between 0 and 1"
            )
        teachers = tuple(Recipe(**one) for one in preset.teachers)
        return Recipe(name, schedule=preset.schedule(steps), teachers=teachers, **preset.options)

    def chain(self) -> tuple[Recipe, ...]:
        """Return the recipes that are trained in turn: those of the teachers, and this one's own last stage."""
        return (*self.teachers, dataclasses.replace(self, teachers=()))

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
            *((self.keep_layers,) if self.keep_layers is not None else ()),
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
        phases = [one for phase in self.schedule if (one := phase.trained_by()).at is not None]
        if len(phases) < len(self.schedule):
            return rows  # a phase without an intervention trains whatever is trained in another
        known = {row.name for row in rows}
        left: dict[str, Untrained] | None = None
        for intervene in phases:
            intervened = fork(gm)
            Pipeline(intervene)(intervened)
            own = {row.name: row for row in untrained(intervened)}
            left = own if left is None else {name: row for name, row in left.items() if name in own}
        reason = "in every phase the teacher's value stands in its place"
        return tuple(
            row if name in known else dataclasses.replace(row, cause="intervened", reason=reason)
            for name, row in (left or {}).items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        options = {"keep_layers": self.keep_layers, "calibrate": self.calibrate}
        extra: dict[str, Any] = {name: plain(one) for name, one in options.items() if one is not None}
        if self.teachers:
            extra["teachers"] = [one.to_dict() for one in self.teachers]
        if self.extra_passes:
            extra["extra_passes"] = [str(one) for one in self.extra_passes]
        distill = plain(self.distill)
        if not self.distill.learned:
            del distill["learned"]  # as it was written before weights were learned
        return {
            "format": FORMAT,
            "name": self.name,
            "ternarize": plain(self.ternarize),
            "activations": plain(self.activations),
            "distill": distill,
            "schedule": [phase.to_dict() for phase in self.schedule],
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
        made: dict[str, Any] = {"name": read_name(values["name"], where)}
        if values.get("steps") is not None:
            made["steps"] = _steps(values["steps"], where)
        for key, kind in (
            ("ternarize", Ternarize),
            ("activations", QuantizeActivations),
            ("distill", Distill),
            ("keep_layers", KeepLayers),
            ("calibrate", Calibrate),
        ):
            if key in values and not (key in ("keep_layers", "calibrate") and values[key] is None):
                made[key] = constructed(kind, values[key], f"{where}.{key}")
        if "schedule" in values:
            made["schedule"] = read_phases(values["schedule"], f"{where}.schedule")
        if "teachers" in values:
            made["teachers"] = _teachers(values["teachers"], f"{where}.teachers")
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
            *(
                f"  {one}"
                for one in (self.keep_layers, self.ternarize, self.activations, self.distill, self.calibrate)
                if one
            ),
            *(f"  {one}" for one in self.extra_passes),
        ]
        for phase in self.schedule:
            rows.append(f"  {phase}")
        before = [f"teacher {number}, {one}" for number, one in enumerate(self.teachers, 1)]
        return "\n".join([*before, *rows])


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


def _teachers(values: Any, where: str) -> tuple[Recipe, ...]:
    if not isinstance(values, list):
        raise RecipeError(f"{where} holds {values!r}; it must be a list of recipes")
    return tuple(Recipe.from_dict(one, f"{where}[{index}]") for index, one in enumerate(values))


def _passes(values: Any, where: str) -> tuple[Pass, ...]:
    if not isinstance(values, list) or not all(isinstance(written, str) for written in values):
        raise RecipeError(f"{where} holds {values!r}; it must be a list of passes as text")
    try:
        return tuple(Pass.parse(written) for written in values)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _steps(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(f"{where}.steps is {value!r}; it must be a whole number of 1 or more")
    return value


def _is_yaml(path: str | Path) -> bool:
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".yaml", ".yml"):
        raise RecipeError(f"recipe {path} must end in .json, .yaml or .yml")
    return suffix != ".json"
