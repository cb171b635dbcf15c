"""Reads what ``--encoding`` says: a name for all weights, and names for some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ti_fx.errors import InputError
from ti_fx.numerics.encodings import AUTO, ENCODINGS, get_encoding

METAVAR = "NAME|GLOB=NAME"
HELP = (
    f"How activations are quantised and weights stored: {', '.join(ENCODINGS)}. May be repeated with weights of "
    "another one, by globs over parameter names or module paths: lm_head=nbits2."
)


@dataclass(frozen=True)
class Encodings:
    """The encoding of all weights (None: not said), and those of single weights by globs."""

    name: str | None = None
    others: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.name is not None or bool(self.others)


def chosen_encodings(written: Sequence[str] | None, *, measured: bool = False) -> Encodings:
    """Return what a user wrote; with ``measured``, ``auto`` may stand for all weights.

    Raises:
        InputError: there is no such encoding, or two are given for all weights.
    """
    name: str | None = None
    others: dict[str, str] = {}
    for item in written or ():
        glob, equals, encoding = item.rpartition("=")
        if not (measured and item == AUTO):
            get_encoding(encoding)
        if equals and not glob:
            raise InputError(f"--encoding is {item!r}; write {METAVAR}")
        if not equals and name is not None:
            raise InputError(
                f"--encoding is {name} and {encoding}; give one for all weights, and others as GLOB=NAME"
            )
        if equals:
            others[glob] = encoding
        else:
            name = encoding
    return Encodings(name, others)
