"""Traces a model as users have it: which inputs are constants, what Python decided, and whose fault a failure is."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ti_fx.errors import (
    CaptureError,
    InputError,
    RandomnessError,
    TiFxError,
    VerificationError,
    VersionError,
    first_line,
)
from ti_fx.frontend.baked_inputs import inputs_read_by_python
from ti_fx.frontend.constant_mode import ConstantMode
from ti_fx.frontend.decisions import Decision, Decisions
from ti_fx.frontend.dynamic_sizes import Dynamic
from ti_fx.frontend.export_program import KnownValues, export_program
from ti_fx.frontend.model_for_trace import unchanged_buffers, whole_numbers_stay
from ti_fx.frontend.randomness import decides_at_random, no_python_randomness
from ti_fx.frontend.size_questions import Questions
from ti_fx.frontend.source_lines import failing_line


@dataclass(frozen=True)
class FollowedDecisions:
    """What a model decides by the example's values, which a trace followed.

    Attributes:
        decisions: the values that Python read, in order.
        loops: where it runs over the rows that a mask hits, and whether any row was not hit on the example.
    """

    decisions: tuple[Decision, ...] = ()
    loops: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class TraceResult:
    """What torch.export gave.

    Attributes:
        program: the exported program.
        static: why a dimension is not dynamic, by ``input.dimension``.
        questions: what was asked about sizes.
        baked: the values of inputs that are constants of the program.
        followed: what was decided by values.
    """

    program: torch.export.ExportedProgram
    static: dict[str, str]
    questions: Questions
    baked: dict[str, Tensor]
    followed: FollowedDecisions = field(default_factory=FollowedDecisions)


def trace_without_decisions(
    model: nn.Module, tensors: dict[str, Tensor], constants: dict[str, Any], dynamic: Dynamic
) -> TraceResult:
    """Trace a model whose Python decides nothing by values, those of a few integer inputs excepted.

    Raises:
        InputError: the model itself fails on the example.
        CaptureError: it can't be traced, or draws random numbers in Python; names the source line where known.
    """
    with no_python_randomness(model):
        if not _is_meta(tensors):
            _no_random_choice(model, tensors, constants)
        first: TraceResult | None = None
        failure: TiFxError | None = None
        try:
            first = TraceResult(*export_program(model, tensors, constants, dynamic, KnownValues()), {})
            reads_values = _reads_values(first.program)
        except Exception as error:
            failure = _capture_error(model, error, tensors, constants)
            reads_values = is_about_values(failure)
            if not reads_values:
                raise failure from error
        if reads_values:
            baked = {name: tensors[name] for name in inputs_read_by_python(model, tensors, constants)}
            rest = {name: value for name, value in tensors.items() if name not in baked}
            if baked and rest:
                try:
                    program = export_program(model, rest, constants, dynamic, KnownValues(baked))
                    return TraceResult(*program, baked)
                except Exception as error:
                    # these inputs are not all that is in the way: the first attempt says what is
                    if failure is not None:
                        raise failure from error
        if first is None:
            assert failure is not None
            raise failure
        return first


def trace_following_decisions(
    model: nn.Module, tensors: dict[str, Tensor], constants: dict[str, Any], dynamic: Dynamic
) -> TraceResult:
    """Trace a model whose Python reads values: one graph follows what it decides on the example, and checks it.

    Raises:
        CaptureError: it can't be traced all the same, or has no values (the meta device); names the source line.
    """
    if _is_meta(tensors):
        raise CaptureError(
            f"{type(model).__name__} decides by values what it computes, and on the meta device there are none; "
            "capture it with values"
        )
    with no_python_randomness(model), whole_numbers_stay(model) as numbers:
        try:
            read = {name: tensors[name] for name in inputs_read_by_python(model, tensors, constants)}
        except Exception as error:  # in training it wants labels
            raise _capture_error(model, error, tensors, constants) from error
        if len(read) == len(tensors):
            read = {}
        first: Exception | None = None
        for baked, reads_numbers in (({}, False), *[(read, False)][: len(read)], (read, True)):
            decisions = Decisions(numbers=reads_numbers)
            rest = {name: value for name, value in tensors.items() if name not in baked}
            try:
                with (
                    torch.no_grad(),
                    torch.random.fork_rng(devices=[]),
                    unchanged_buffers(model),
                    ConstantMode([*baked.values(), *numbers], decisions=decisions) as mode,
                ):
                    torch.manual_seed(0)
                    model(**tensors, **constants)
                known = KnownValues(baked, numbers, decisions)
                # numbers that Python read are sizes, mostly: those that they fit are fixed, too
                found = export_program(model, rest, constants, "none" if reads_numbers else dynamic, known)
            except VersionError:
                raise
            except Exception as error:
                first = first or error
                continue
            taken = tuple(itertools.chain(*decisions.by_line.values()))
            return TraceResult(*found, baked, FollowedDecisions(taken, mode.loops))
    assert first is not None
    raise _capture_error(model, first, tensors, constants) from first


def is_about_values(error: Exception) -> bool:
    """Whether an error of a trace says that Python reads values."""
    said = "data-dependent|data is not allocated|not a subset of src_bound|cannot be solved|can't be computed from"
    return isinstance(error, CaptureError | VerificationError) and bool(re.search(said, str(error)))


def _is_meta(tensors: dict[str, Tensor]) -> bool:
    return any(value.is_meta for value in tensors.values())


def _reads_values(program: torch.export.ExportedProgram) -> bool:
    """Whether the program turns a tensor's value into a size or a flag."""
    return any(
        getattr(node.target, "__name__", "") in ("item.default", "_local_scalar_dense.default")
        for node in program.graph.nodes
    )


def _no_random_choice(model: nn.Module, tensors: dict[str, Tensor], constants: dict[str, Any]) -> None:
    try:
        where = decides_at_random(model, tensors, constants)
    except Exception as error:
        raise _capture_error(model, error, tensors, constants) from error
    if where is not None:
        raise RandomnessError(
            f"{type(model).__name__} decides by a random number what it computes ({where}), which a trace would freeze "
            "into one outcome; turn that off (layerdrop=0, apply_spec_augment=False, ...)"
        )


def _capture_error(
    model: nn.Module, error: Exception, tensors: dict[str, Tensor], constants: dict[str, Any]
) -> TiFxError:
    """Return what to tell the user: the example does not fit the model, or the model does not fit one graph."""
    if isinstance(error, TiFxError):
        return error
    name = type(model).__name__
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), unchanged_buffers(model):
            model(**tensors, **constants)
    except Exception as own:
        return InputError(
            f"{name} fails on the example{_at(own)}: {first_line(own)}; give inputs that it takes"
        )
    advice = "make it a tensor operation, or leave that part out of the model"
    if "data-dependent" in str(error):
        advice = f"control flow that depends on tensor values has no place in one graph: {advice}"
    return CaptureError(f"{name} can't be captured{_at(error)}: {first_line(error)}; {advice}")


def _at(error: BaseException) -> str:
    where = failing_line(error)
    return f" ({where})" if where else ""
