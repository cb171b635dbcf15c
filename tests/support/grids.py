"""Which encodings the quick tests take, where each is exported: the others have a quick test of their own numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from ti_fx.numerics.encodings import ENCODINGS
from ti_fx.numerics.quantiser import Quantiser

QUICK = (
    "int8-tensor",
    "int8-token",
    "reference",
    "nbits2",
    "nbits2-64",
    "nbits2-32",
    "portable",
    "base3",
    "float",
)
LEARNED = tuple(name for name, encoding in ENCODINGS.items() if encoding.name.endswith("learned"))
FEW_BITS = tuple(name for name in ENCODINGS if name not in (*QUICK, *LEARNED))
UNLEARNED = tuple(name for name in ENCODINGS if name not in LEARNED)
_quick = {ENCODINGS[name].numerics for name in QUICK}


def each(names: Iterable[str] = ENCODINGS) -> list[Any]:
    """Return names of encodings as parameters, slow where the quick tests leave one out."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def each_function(quantisers: Iterable[Quantiser]) -> list[Any]:
    """Return the functions of quantisers of a value alone as parameters, slow where no quick encoding has one."""
    return [
        one.function if one.name in _quick else pytest.param(one.function, marks=pytest.mark.slow)
        for one in quantisers
        if one.start is None
    ]
