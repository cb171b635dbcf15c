"""An arm is a way to train a student: a recipe of a given length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ti_fx import Recipe
from ti_fx.passes import Calibrate, Distill, Ternarize
from ti_fx.recipe import DEFAULT, PRESETS, Phase

BASELINE = "ternarybert"  # what every other arm is compared with
_SHARE = 0.25  # of training under an intervention, where a recipe asks for it


@dataclass(frozen=True)
class Arm:
    """One method.

    Attributes:
        name: as the results have it.
        recipe: for a number of optimiser steps.
    """

    name: str
    recipe: Callable[[int], Recipe]


def all_arms() -> dict[str, Arm]:
    """Return every preset as an arm, and the controls."""
    arms = [Arm(name, _preset(name)) for name in PRESETS]
    arms.append(Arm("restart", _restart))
    by_row, relative = Ternarize(weights="row"), PRESETS[DEFAULT].options["distill"]
    logits = Distill(layer_outputs=0, scores=0, attention_outputs=0, logits_loss="kl")
    parts: dict[str, dict[str, Any]] = {  # what each part of the default recipe brings
        "row": {"ternarize": by_row},
        "row-relative": {"ternarize": by_row, "distill": relative},
        "row-calibrated": {"ternarize": by_row, "calibrate": Calibrate()},
        "row-calibrated-cell": {"ternarize": by_row, "calibrate": Calibrate(latents="cell", margin=0.2)},
        "row-calibrated-logits": {"ternarize": by_row, "calibrate": Calibrate(), "distill": logits},
        "tensor-calibrated": {"calibrate": Calibrate()},
    }
    arms += [Arm(name, _preset(BASELINE, name, **options)) for name, options in parts.items()]
    arms.append(Arm("calibrated-layer-blend", _preset("layer-blend", calibrate=Calibrate())))
    return {arm.name: arm for arm in arms}


def _preset(preset: str, name: str = "", **options: Any) -> Callable[[int], Recipe]:
    def recipe(steps: int) -> Recipe:
        made = Recipe.preset(preset, intervention_steps=_SHARE)
        return dataclasses.replace(made, name=name or preset, steps=steps, **options)

    return recipe


def _restart(steps: int) -> Recipe:
    """Return the baseline with the optimiser and the rate begun anew where an intervention would have ended."""
    schedule = (Phase("first", steps=_SHARE), Phase("second", restart=True))
    return dataclasses.replace(Recipe.preset(BASELINE), name="restart", schedule=schedule, steps=steps)
