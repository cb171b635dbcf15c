"""Makes the recipe that a command's options ask for of the one that ``--recipe`` names, and says what it led to."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ti_fx.cli import _output as output
from ti_fx.cli._encodings import Encodings
from ti_fx.errors import InputError
from ti_fx.recipe import FEWEST, PRESETS, Recipe, chosen_recipe

if TYPE_CHECKING:
    from ti_fx.train import TernaryTrainer


def intervened(written: str, steps: float | None) -> Recipe:
    """Return a preset with an intervened part of so many steps, or any recipe as it is where that is None.

    Raises:
        InputError: it is no preset that intervenes. RecipeError: no such recipe, or steps that none can have.
    """
    recipe = chosen_recipe(written)
    if steps is None:
        return recipe
    if written not in PRESETS or PRESETS[written].length is None:
        raise InputError(
            f"--intervention-steps is for a preset that intervenes, and {written} is none: a recipe's file says how "
            "long each phase is; leave it out"
        )
    return Recipe.preset(written, intervention_steps=int(steps) if steps >= 1 and steps % 1 == 0 else steps)


def fitted(recipe: Recipe, written: str, steps: int) -> Recipe:
    """Return a preset that is too long for so few steps with an intervened part of a third of them, and say so."""
    least = sum(int(phase.steps or 1) for phase in recipe.phases())
    if written not in PRESETS or steps >= least:
        return recipe
    length = max(FEWEST, steps // 3)
    shorter = Recipe.preset(written, intervention_steps=length)
    if steps > length:
        output.say(
            f"{steps} steps are too few for {written} as published, which intervenes in {least - 1}: it intervenes in "
            f"{length} here; --intervention-steps sets that"
        )
    return replace(recipe, schedule=shorter.schedule)


def with_encodings(recipe: Recipe, encodings: Encodings) -> Recipe:
    """Return the recipe with other encodings; one for all weights takes the place of all that it names."""
    if not encodings:
        return recipe
    own = recipe.activations
    others = {} if encodings.name is not None else dict(own.encodings)
    return replace(
        recipe,
        activations=replace(
            own, encoding=encodings.name or own.encoding, encodings={**others, **encodings.others}
        ),
    )


def calibrate(trainer: TernaryTrainer) -> None:
    """Calibrate where the recipe says so, before training would, and say what that did."""
    one = trainer.recipe.calibrate
    if one is None:
        return
    output.say(f"calibrating the ternary weights on up to {one.rows:,} training rows, without gradients")
    started = time.perf_counter()
    trainer.calibrate()
    if trainer.calibration is None:  # a warning says why
        return
    done = [row for row in trainer.calibration.report if row.rows and row.inputs]
    left = len(trainer.calibration.report) - len(done)
    before, after = (
        sum(getattr(row, name) for row in done) / max(len(done), 1) for name in ("before", "after")
    )
    said = f", {left} left as rounding has them" if left else ""
    output.say(
        f"calibrated {len(done)} weights{said}: error of their products {before:.3f} -> {after:.3f}, "
        f"{time.perf_counter() - started:.0f} s"
    )


def say_decisions(trainer: TernaryTrainer) -> None:
    """Say what was measured and decided while a trainer made its graph."""
    if trainer.choice is not None:
        output.say(str(trainer.choice))
    for row in trainer.report.passes if trainer.report is not None else ():
        if row.explanation:
            output.say(row.explanation)
