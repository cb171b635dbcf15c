"""A run goes on with the recipe that it began with, or what differs is said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ti_fx.errors import CheckpointError
from ti_fx.recipe import Recipe


def check_recipe(folder: str | Path, facts: Mapping[str, Any], recipe: Recipe) -> None:
    """Check that a checkpoint is to go on with the recipe that it was trained with.

    Raises:
        CheckpointError: with another one; names the options that differ, with both values.
    """
    trained, now = facts["recipe"], recipe.to_dict()
    if trained == now:
        return
    differing = [
        f"{name} was {_shown(one)} and is {_shown(other)}" for name, one, other in _differences(trained, now)
    ]
    more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise CheckpointError(
        f"{folder} was trained with recipe {trained.get('name')!r} of other options: {', '.join(differing[:3])}{more}; "
        f"resume with that recipe (ti_fx.Recipe.from_dict of its ti_fx.json), or begin anew in another folder"
    )


def _differences(one: Any, other: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Return the places in two JSON values that differ, with both values; None stands for a missing one."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = list(dict.fromkeys([*one, *other]))
        pairs = [(f"{name}.{key}" if name else str(key), one.get(key), other.get(key)) for key in keys]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"{name}[{index}]", *both) for index, both in enumerate(zip(one, other, strict=True))]
    else:
        return [] if one == other else [(name, one, other)]
    return [found for inner, left, right in pairs for found in _differences(left, right, inner)]


def _shown(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, dict | list) else repr(value)
