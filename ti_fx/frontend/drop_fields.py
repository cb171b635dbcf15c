"""Finds the fields by which a model drops layers or masks inputs at random, for the message that refuses that."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

_DROPS = re.compile(r"\w*(layer_?drop(_?prob|_rate)?|drop_?path(_?prob|_rate)?|stochastic_depth\w*)")
_MASKS = ("apply_spec_augment",)
_SHOWN = 4


def random_fields(model: nn.Module) -> str:
    """Return what to set so that a model drops nothing at random: its modules' own fields, and its configuration's.

    "" where no field is known. A module copies its configuration's field when it is built, mostly, so that setting the
    configuration's afterwards changes nothing.
    """
    own = list(dict.fromkeys(_of_modules(model)))
    config = list(dict.fromkeys(_of_configuration(model)))
    parts = []
    if own:
        more = ", ..." if len(own) > _SHOWN else ""
        parts.append(f"set {', '.join(own[:_SHOWN])}{more} on the model")
    if config:
        parts.append(f"build it with {', '.join(config[:_SHOWN])} in its configuration")
    return ", or ".join(parts)


def _of_modules(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        for field, value in vars(module).items():
            if _DROPS.fullmatch(field) and isinstance(value, int | float) and value > 0:
                yield f"{name}.{field} = 0".removeprefix(".")


def _of_configuration(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        config = getattr(module, "config", None)
        for field, value in (vars(config) if hasattr(config, "__dict__") else {}).items():
            if _DROPS.fullmatch(field) and isinstance(value, int | float) and value > 0:
                yield f"{field}=0"
            elif field in _MASKS and value is True:
                yield f"{field}=False"
