"""Runs torch.export on a model, with fewer dynamic sizes each time until the model allows them."""

from __future__ import annotations

import io
import re
import sys
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

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
)
from ti_fx.frontend.model_for_trace import constants_bound
from ti_fx.frontend.patches import broadcast_masks, modules_stay, no_checks_of_values, no_empty_selections


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
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """Return the program, and why a dimension is not dynamic, by ``input.dimension``.

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
    spare: tuple[torch.export.ExportedProgram, dict[str, str]] | None = None
    for attempt in attempts:
        shapes, static = dynamic_shapes(tensors, attempt)
        if reason:
            static = {
                f"{name}.{index}": reason
                for name, value in tensors.items()
                for index in range(int(attempt == "batch"), value.dim())
            }
        try:
            program = _exported(model, tensors, constants, shapes, known)
            if fixed := fixed_by_equalities(program, tensors):
                for name, index in fixed:
                    del shapes[name][index]
                    size = tensors[name].shape[index]
                    static[f"{name}.{index}"] = f"the model's code fixes {name}.{index} at {size}"
                program = _exported(model, tensors, constants, shapes, known)
        except VersionError:
            raise
        except Exception as error:
            # what reads values may do without them where sizes are numbers
            if attempt == attempts[-1] or not (known.baked or follows or _is_about_shapes(error)):
                if spare is None:
                    raise
                break
            reason = reason or _shape_reason(error)
            continue
        if not (follows and has_open_sizes(program)):
            return program, static
        spare = spare or (program, static)
        reason = (
            reason or "the model computes sizes from it with tensors, which only a fixed size makes numbers"
        )
    assert spare is not None
    return spare


def _with_own_batches(
    model: nn.Module,
    tensors: dict[str, Tensor],
    constants: dict[str, Any],
    dynamic: Dynamic,
    known: KnownValues,
) -> tuple[torch.export.ExportedProgram, dict[str, str]] | None:
    """Return the program in which inputs of other numbers of rows have batches of their own; None if it has none."""
    shapes, static = dynamic_shapes(tensors, dynamic, own_batches=True)
    try:
        program = _exported(model, tensors, constants, shapes, known)
    except VersionError:
        raise
    except Exception:  # whatever the trace raises; without these batches it is tried again
        return None
    settled = not fixed_by_equalities(program, tensors) and not has_open_sizes(program)
    return (program, static) if settled else None


def _exported(
    model: nn.Module,
    tensors: dict[str, Tensor],
    constants: dict[str, Any],
    shapes: dict[str, Any],
    known: KnownValues,
) -> torch.export.ExportedProgram:
    printed = io.StringIO()  # torch prints the half-made graph of a failed trace
    if known.decisions is not None:
        known.decisions.restart()
    values = ConstantMode([*known.baked.values(), *known.numbers], decisions=known.decisions)
    with (
        modules_stay(),
        constants_bound(model, list(tensors), constants),
        torch.random.fork_rng(devices=[]),
        redirect_stderr(printed),
        nullcontext() if known.decisions is None else no_checks_of_values(),
        broadcast_masks(),
        no_empty_selections(lambda: values.looping > 0),
        values,
    ):
        exported = torch.export.export(model, (), tensors, dynamic_shapes=shapes, strict=False)
    sys.stderr.write(printed.getvalue())
    return exported


def _is_about_shapes(error: Exception) -> bool:
    return bool(re.search(r"[Cc]onstraint|dynamic_shapes|specializ", str(error)))


def _shape_reason(error: BaseException) -> str:
    """Return which size the model's code fixes, as far as torch.export tells."""
    found = re.search(
        r"marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)", str(error)
    )
    return f"the model's code fixes {found[1]} at {found[2]}" if found else first_line(error)
