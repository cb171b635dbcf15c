"""An arm is a way to train a student: a recipe of a given length, and how the student starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from ti_fx import Recipe
from ti_fx.passes import Calibrate
from ti_fx.recipe import PRESETS, Phase

BASELINE = "ternarybert"  # what every other arm is compared with
_SHARE = 0.25  # of training under an intervention, where a recipe asks for it


@dataclass(frozen=True)
class Arm:
    """One method.

    Attributes:
        name: as the results have it.
        recipe: for a number of optimiser steps.
        calibration: of the weights before the first step; None: they are rounded.
    """

    name: str
    recipe: Callable[[int], Recipe]
    calibration: Calibrate | None = None


def all_arms() -> dict[str, Arm]:
    """Return every preset as an arm, and the controls."""
    arms = [Arm(name, _preset(name)) for name in PRESETS]
    arms.append(Arm("restart", _restart))
    arms.append(Arm("calibrated", _preset(BASELINE), Calibrate()))
    arms.append(Arm("calibrated-cell", _preset(BASELINE), Calibrate(latents="cell")))
    arms.append(Arm("calibrated-layer-blend", _preset("layer-blend"), Calibrate()))
    return {arm.name: arm for arm in arms}


def _preset(name: str) -> Callable[[int], Recipe]:
    def recipe(steps: int) -> Recipe:
        return dataclasses.replace(Recipe.preset(name, intervention_steps=_SHARE), steps=steps)

    return recipe


def _restart(steps: int) -> Recipe:
    """Return the baseline with the optimiser and the rate begun anew where an intervention would have ended."""
    schedule = (Phase("first", steps=_SHARE), Phase("second", restart=True))
    return dataclasses.replace(Recipe.preset(BASELINE), name="restart", schedule=schedule, steps=steps)
