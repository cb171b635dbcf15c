"""Every error that ti_fx raises on purpose is a class of this file.

A message is one line that says what is wrong, where, and what to do next. ``exit_code`` is what the command line
returns: 2 for bad input, 1 for a check that failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TiFxError(Exception):
    """Base of every error a user can cause or meet. The command line prints it as one line, without a traceback."""

    exit_code = 2


class InputError(TiFxError, ValueError):
    """An argument, file or value that a user gave can't be used."""


class CaptureError(TiFxError):
    """The model can't be captured as one graph, or the captured graph does not equal the model."""


class SizeError(CaptureError):
    """The captured graph does not equal the model at a size that it claims to take: that size has to be fixed."""


class WriteError(CaptureError):
    """The model's forward writes into a tensor of its own in a way that has no place in a graph."""


class RandomnessError(CaptureError):
    """The model decides something by Python's or NumPy's random numbers, which a trace would freeze."""


class VersionError(CaptureError):
    """An internal of an installed library is not what ti_fx knows, so what it replaces there would not fit."""


class PreconditionError(TiFxError):
    """A pass was run on a graph that is not ready for it; the message names what is missing.

    Attributes:
        missing: the pass to run first, as text (``duplicate-teacher``), which the message then ends with; None where
            no pass would help.
    """

    def __init__(self, message: str, missing: str | None = None) -> None:
        super().__init__(message if missing is None else f"{message}; run {missing} first")
        self.missing = missing


class PostconditionError(TiFxError):
    """A pass did not deliver what it promises: a bug in that pass."""

    exit_code = 1


class VerificationError(TiFxError):
    """An invariant of the graph does not hold; the message names the invariant and the node."""

    exit_code = 1


class SelectionError(TiFxError):
    """A selection (skip globs, layers, a stack, a point) matches nothing or can't be applied."""


class RecipeError(TiFxError):
    """A recipe or the text of a pass can't be read."""


class EncodingMismatch(TiFxError):
    """An encoding was asked for that is not the one the student was trained with."""


class ExportError(TiFxError):
    """The graph can't be written as ONNX."""


class ParityError(TiFxError):
    """ONNX Runtime and PyTorch disagree about the exported graph."""

    exit_code = 1


class CoverageError(TiFxError):
    """A model does not pass a stage of the zoo's chain; the message names the construct or the number."""

    exit_code = 1


class CheckpointError(TiFxError):
    """A checkpoint is damaged, incomplete or belongs to another model."""


class DataError(TiFxError):
    """Training or evaluation data can't be used."""


class TrainingError(TiFxError):
    """Training can't go on: a loss, a gradient or a weight is no number."""


class MissingExtra(TiFxError, ImportError):
    """An optional dependency is not installed; the message names the extra that installs it."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or the list of known names."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(repr(candidate) for candidate in near) + "?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"; known: {shown}" if known else ""
