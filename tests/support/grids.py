"""Which encodings the quick tests take, where each is exported: the others have a quick test of their own numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from slow import slow_but

from ti_fx.numerics.encodings import ENCODINGS

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


def each(names: Iterable[str] = ENCODINGS) -> list[Any]:
    """Return names of encodings as parameters, slow where the quick tests leave one out."""
    return slow_but(QUICK, names)
