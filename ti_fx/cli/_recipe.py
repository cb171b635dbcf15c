"""Reads what ``--recipe`` names: a preset or a file."""

from __future__ import annotations

from pathlib import Path

from ti_fx.recipe import Recipe


def chosen_recipe(written: str) -> Recipe:
    """Return a preset by its name, or the recipe in a file: whatever has a suffix or a folder is a file.

    Raises:
        RecipeError: no such preset, or the file can't be read.
    """
    return Recipe.load(written) if Path(written).suffix or "/" in written else Recipe.preset(written)
