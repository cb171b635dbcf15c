"""The command ``ti-fx recipes`` lists the recipes that there are, and explains one, as a file to edit."""

from __future__ import annotations

from textwrap import wrap
from typing import Annotated

import typer

from ti_fx.cli import _output as output
from ti_fx.errors import InputError

EXAMPLES = """\b
Examples:
  ti-fx recipes
  ti-fx recipes show ti-g > my.yaml
  ti-fx train ./my-classifier --recipe my.yaml --data train.csv --out runs/mine"""

WIDTH = 100  # of a comment


def recipes(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[show NAME|FILE]",
            help="Print one recipe as YAML, which --recipe takes as a file, with what it does; left out: list the "
            "presets.",
            show_default=False,
        ),
    ] = None,
    intervention_steps: Annotated[
        float | None,
        typer.Option(
            help="How long the teacher intervenes: steps (6 or more), or a fraction of training (0.3).",
            metavar="N",
        ),
    ] = None,
) -> None:
    """List the recipes that there are, or explain one.

    A recipe holds the options of the passes, and the phases of training.
    """
    from ti_fx.cli._recipe import intervened
    from ti_fx.recipe import DEFAULT, PRESETS

    if not words:
        if intervention_steps is not None:
            raise InputError("--intervention-steps is for one recipe; add  show NAME")
        rows = [
            (f"{name} (default)" if name == DEFAULT else name, preset.what, preset.source)
            for name, preset in PRESETS.items()
        ]
        output.table(("recipe", "what it does", "source"), rows)
        return
    if words[0] != "show" or len(words) != 2:
        raise InputError(
            f"ti-fx recipes takes  show NAME , not {' '.join(words)!r}; the names: {', '.join(PRESETS)}"
        )
    recipe = intervened(words[1], intervention_steps)
    for text in _explained(words[1]):
        for line in wrap(text, WIDTH):
            print(f"# {line}")
    print(recipe.to_yaml(), end="")


def _explained(written: str) -> list[str]:
    """Return what a preset does, and its source; nothing of a file."""
    from ti_fx.recipe import PRESETS

    if written not in PRESETS:
        return []
    preset = PRESETS[written]
    return [preset.what, f"Source: {preset.source}."]
