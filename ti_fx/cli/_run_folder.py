"""Checks the folder that ``ti-fx train`` writes: nothing is overwritten, and a run goes on as it began."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ti_fx.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from ti_fx.recipe import Recipe

RECIPE, RESULTS = "recipe.json", "results.json"


def check_folder(out: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse to write over another run, and to resume where there is none."""
    from ti_fx.train.chain import stage_folder
    from ti_fx.train.checkpoint import DESCRIPTION, last_finished

    folders = [stage_folder(out, recipe, index) for index in range(len(recipe.chain()))]
    begun = any(last_finished(folder) is not None for folder in folders)
    if resume and not begun:
        raise CheckpointError(f"{out} holds no finished checkpoint to resume from; leave out --resume")
    if not resume and (begun or (out / DESCRIPTION).exists()):
        raise InputError(f"{out} holds a run already; --resume goes on with it, another --out begins anew")


def check_recipe_of(out: Path, recipe: Recipe) -> None:
    """Refuse to go on with another recipe than the one that the newest checkpoint was trained with."""
    from ti_fx.train.checkpoint import last_finished, read_facts
    from ti_fx.train.same_recipe import check_recipe

    last = last_finished(out)
    if last is not None:  # else a chain has not come to its last stage
        check_recipe(last, read_facts(last), replace(recipe, teachers=()))


def is_finished(out: Path, recipe: Recipe, steps: int) -> bool:
    """Return whether all steps were trained and the results written.

    Raises:
        CheckpointError: the run was for another number of steps.
    """
    from ti_fx.train.chain import stage_steps
    from ti_fx.train.checkpoint import last_finished, training_state

    last = last_finished(out)
    if last is None:
        return False
    state, steps = training_state(last), stage_steps(recipe, steps)[-1]
    if state.max_steps != steps:
        raise CheckpointError(
            f"{last} was trained for {state.max_steps} steps in all, and these rows and --batch-size are for {steps}; "
            "resume with the options and data that it began with, or begin anew with another --out"
        )
    return state.global_step >= steps and (out / RESULTS).is_file()


def check_writable(out: Path) -> None:
    """Find out now, not after training, whether the folder can be made and written to; nothing is made yet."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"can't write to {out}: {there} is a file; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"can't write to {out}: {there} is read-only; choose a folder you can write to")
