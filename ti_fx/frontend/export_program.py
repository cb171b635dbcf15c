"""Runs torch.export on a model, with fewer dynamic sizes each time until the model allows them."""

from __future__ import annotations

import io
import re
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ti_fx.errors import VersionError, first_line
from ti_fx.frontend.constant_mode import ConstantMode
from ti_fx.frontend.decisions import Decisions
from ti_fx.frontend.dynamic_sizes import (
    Dynamic,
    dynamic_shapes,
    fixed_by_equalities,
    has_open_sizes,
    has_own_batches,
    places,
    with_suggested_batch,
)
from ti_fx.frontend.model_checks import kept_checks
from ti_fx.frontend.model_for_trace import constants_bound
from ti_fx.frontend.patches import (
    broadcast_masks,
    inference_without_gradients,
    modules_stay,
    no_empty_selections,
    regions_stay,
)
from ti_fx.frontend.size_conditions import SizeSymbols
from ti_fx.frontend.size_questions import Questions, size_questions


class Exported(NamedTuple):
    """What torch.export gave.

    Attributes:
        program: the exported program.
        static: why a dimension is not dynamic, by ``input.dimension``.
        questions: what was asked about sizes in the trace.
    """

    program: torch.export.ExportedProgram
    static: dict[str, str]
    questions: Questions


@dataclass(frozen=True)
class KnownValues:
    """The values that Python may read in a trace.

    Attributes:
        baked: values of inputs that are constants of the program.
        numbers: the model's buffers of one whole number.
        decisions: what Python read on the example; None: what it reads may not depend on values.
    """

    baked: dict[str, Tensor] = field(default_factory=dict)
    numbers: tuple[Tensor, ...] = ()
    decisions: Decisions | None = None


def export_program(
    model: nn.Module,
    tensors: dict[str, Tensor],
    constants: dict[str, Any],
    dynamic: Dynamic,
    known: KnownValues,
) -> Exported:
    """Return the program, why a dimension is not dynamic, and what was asked about sizes.

    Sizes that the model ties or fixes in a way that can't be expressed are fixed: all but the batch, or all.
    """
    constants = {**constants, **known.baked}
    if dynamic != "none" and has_own_batches(tensors):
        found = _with_own_batches(model, tensors, constants, dynamic, known)
        if found is not None:
            return found
    follows = known.decisions is not None
    attempts: list[Dynamic] = [dynamic]
    if dynamic in ("auto", "all"):  # values that are constants mostly fix the batch, too
        attempts += ["none"] if known.baked else ["batch", "none"]
    reason = ""
    spare: Exported | None = None
    for attempt in attempts:
        shapes, static = dynamic_shapes(tensors, attempt)
        if reason:
            static = {
                f"{name}.{index}": reason
                for name, value in tensors.items()
                for index in range(int(attempt == "batch"), value.dim())
            }
        questions = Questions()
        try:
            program = _within_bounds(model, tensors, constants, shapes, known, questions)
            if fixed := [*fixed_by_equalities(program, tensors), *_beyond_text(program, tensors, questions)]:
                for name, index in dict.fromkeys(fixed):
                    del shapes[name][index]
                    size = tensors[name].shape[index]
                    static[f"{name}.{index}"] = f"the model's code fixes {name}.{index} at {size}"
                program = _exported(model, tensors, constants, shapes, known, questions)
        except VersionError:
            raise
        except Exception as error:
            # what reads values may do without them where sizes are numbers
            if attempt == attempts[-1] or not (known.baked or follows or _is_about_shapes(error)):
                if spare is None:
                    raise
                break
            reason = reason or _shape_reason(error, questions)
            continue
        exported = Exported(program, static, questions)
        if not (follows and has_open_sizes(program)):
            return exported
        spare = spare or exported
        reason = (
            reason or "the model computes sizes from it with tensors, which only a fixed size makes numbers"
        )
    assert spare is not None
    return spare


def _within_bounds(
    model: nn.Module,
    tensors: dict[str, Tensor],
    constants: dict[str, Any],
    shapes: dict[str, Any],
    known: KnownValues,
    questions: Questions,
) -> torch.export.ExportedProgram:
    """Trace; where the model asks bounds or multiples of the batch, ask torch.export again for a batch within them."""
    try:
        return _exported(model, tensors, constants, shapes, known, questions)
    except torch._dynamo.exc.UserError as error:
        instead = with_suggested_batch(str(error), shapes)
        if instead is None:
            raise
        shapes.update(instead)
        return _exported(model, tensors, constants, shapes, known, questions)


def _beyond_text(
    program: torch.export.ExportedProgram, tensors: dict[str, Tensor], questions: Questions
) -> list[tuple[str, int]]:
    """Return the dimensions about which a branch asks what can't be written as arithmetic of sizes."""
    asked = SizeSymbols(program).without_text(questions)
    return [
        place for place, size in places(program, tensors).items() if asked & set(size.node.expr.free_symbols)
    ]


def _with_own_batches(
    model: nn.Module,
    tensors: dict[str, Tensor],
    constants: dict[str, Any],
    dynamic: Dynamic,
    known: KnownValues,
) -> Exported | None:
    """Return the program in which inputs of other numbers of rows have batches of their own; None if it has none."""
    shapes, static = dynamic_shapes(tensors, dynamic, own_batches=True)
    questions = Questions()
    try:
        program = _exported(model, tensors, constants, shapes, known, questions)
    except VersionError:
        raise
    except Exception:  # whatever the trace raises; without these batches it is tried again
        return None
    fixed = [*fixed_by_equalities(program, tensors), *_beyond_text(program, tensors, questions)]
    return None if fixed or has_open_sizes(program) else Exported(program, static, questions)


def _exported(
    model: nn.Module,
    tensors: dict[str, Tensor],
    constants: dict[str, Any],
    shapes: dict[str, Any],
    known: KnownValues,
    questions: Questions,
) -> torch.export.ExportedProgram:
    printed = io.StringIO()  # torch prints the half-made graph of a failed trace
    if known.decisions is not None:
        known.decisions.restart()
    values = ConstantMode([*known.baked.values(), *known.numbers], decisions=known.decisions)
    with (
        modules_stay(),
        inference_without_gradients(),
        regions_stay(),
        torch.enable_grad(),
        constants_bound(model, list(tensors), constants),
        torch.random.fork_rng(devices=[]),
        redirect_stderr(printed),
        kept_checks(lambda: known.decisions is None),
        broadcast_masks(),
        no_empty_selections(lambda: values.looping > 0),
        size_questions(questions),
        values,
    ):
        exported = torch.export.export(model, (), tensors, dynamic_shapes=shapes, strict=False)
    sys.stderr.write(printed.getvalue())
    return exported


def _is_about_shapes(error: Exception) -> bool:
    return bool(re.search(r"[Cc]onstraint|dynamic_shapes|specializ", str(error)))


def _shape_reason(error: BaseException, questions: Questions) -> str:
    """Return which size the model's code fixes, as far as torch.export tells, and where."""
    found = re.search(
        r"marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)", str(error)
    )
    if found is None:
        return first_line(error)
    place = re.fullmatch(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", found[1]) or next(
        iter(re.finditer(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", str(error))), None
    )
    fixed = f"the model's code fixes {found[1]} at {found[2]}"
    if place is None:
        return fixed
    return questions.why_fixed(place[1], int(place[2]), int(found[2])) or fixed
