"""Reads the checkpoint that ``--start`` names: the weights that a student begins with in place of the teacher's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ti_fx.errors import InputError

if TYPE_CHECKING:
    from ti_fx.recipe import Recipe


def require_start(start: Path, recipe: Recipe) -> None:
    """Refuse a start that this recipe would not begin from: none of ours, or of other ternary weights.

    Raises:
        CheckpointError: there is no finished checkpoint. InputError: its weights are ternary in another way.
    """
    from ti_fx.recipe import Recipe as Read
    from ti_fx.train.checkpoint import read_facts, read_weights

    facts = read_facts(start)
    read_weights(start, facts)
    theirs = Read.from_dict(facts["recipe"], where=str(start)).ternarize
    if theirs != recipe.ternarize:
        raise InputError(
            f"--start {start} was made with {theirs} and recipe {recipe.name!r} has {recipe.ternarize}, which makes "
            "other codes of its weights; give the recipe in its recipe.json, or calibrate with --recipe"
        )


def require_teacher(source: str) -> None:
    """Refuse a student of ours as a teacher: its weights are latent ones, not a trained model's.

    Raises:
        InputError: the folder is a checkpoint of a student.
    """
    from ti_fx.train.checkpoint import DESCRIPTION

    if (Path(source) / DESCRIPTION).is_file():
        raise InputError(
            f"{source} is a checkpoint of a ternary student, and the teacher must be the full-precision model: give "
            f"that, and --start {source} to begin from these weights"
        )
