"""What the rules of ``ti_fx/zoo`` can't know, by model type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ti_fx.zoo.examples import Maker

# Fields of a configuration, by the configuration's own ``model_type`` (also one inside another).
FIELDS: dict[str, dict[str, Any]] = {}

# Which of transformers' tables of classes has the class to build ("BASE": the model without a head).
TASKS: dict[str, str] = {}

# Makers of inputs that the rules don't make, or make otherwise, and inputs that the rules would make and that have
# to stay away.
ALSO: dict[str, dict[str, tuple[Maker, ...]]] = {}
UNUSED: dict[str, frozenset[str]] = {}

# Types that are not built, and why.
REFUSED: dict[str, str] = {}
