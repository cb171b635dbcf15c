"""Every way to round activations, one a file: a quantiser is known as soon as its file is here.

Each file has the fake-quantiser that the graph calls, with its gradient, and what it becomes in ONNX.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from ti_fx.numerics.quantiser import Quantiser


def _found() -> Iterator[Quantiser]:
    for file in pkgutil.iter_modules(__path__, f"{__name__}."):
        module = importlib.import_module(file.name)
        yield from (value for value in vars(module).values() if isinstance(value, Quantiser))


QUANTISERS: dict[str, Quantiser] = {quantiser.name: quantiser for quantiser in _found()}
BY_FUNCTION: dict[object, Quantiser] = {quantiser.function: quantiser for quantiser in QUANTISERS.values()}
