"""Every way to make weights ternary or binary, a file each: a method is known as soon as its file is here.

Each file has the fake-quantiser that the graph calls, with its gradient, and the codes and scale that it stands for.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from ti_fx.errors import InputError, did_you_mean
from ti_fx.numerics.weight_quantiser import WeightQuantiser


def _found() -> Iterator[WeightQuantiser]:
    for file in pkgutil.iter_modules(__path__, f"{__name__}."):
        module = importlib.import_module(file.name)
        yield from (value for value in vars(module).values() if isinstance(value, WeightQuantiser))


METHODS: dict[str, WeightQuantiser] = {quantiser.name: quantiser for quantiser in _found()}
BY_FUNCTION: dict[object, WeightQuantiser] = {quantiser.function: quantiser for quantiser in METHODS.values()}


def get_method(name: str) -> WeightQuantiser:
    """Return the method called ``name``.

    Raises:
        InputError: there is none; the message lists near names.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r} of weights{did_you_mean(name, METHODS)}")
    return METHODS[name]
