"""A schedule says which phase a step belongs to, and what its learning rate is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import TrainingArguments, get_scheduler

from ti_fx.errors import InputError
from ti_fx.recipe import Phase


@dataclass(frozen=True)
class Span:
    """A phase with its place: it covers optimiser steps ``start`` to ``end`` (exclusive)."""

    phase: Phase
    start: int
    end: int


def spans(
    phases: Sequence[Phase],
    total: int,
    ways: str = "raise max_steps or num_train_epochs, or shorten the phases",
) -> tuple[Span, ...]:
    """Lay the phases out over ``total`` optimiser steps; a fraction is one of these, and ends at the nearest step.

    Args:
        phases: in order.
        total: optimiser steps in all.
        ways: what to do where they don't fit.

    Raises:
        InputError: the phases need more steps than there are.
    """
    laid: list[Span] = []
    start, place = 0, 0.0
    for phase in phases:
        place += (phase.steps or 0) * (total if isinstance(phase.steps, float) else 1)
        end = total if phase.steps is None else round(place)
        if end > total or end <= start:
            raise InputError(
                f"the recipe's phases need at least {_needed(phases)} optimiser steps and training has {total}; {ways}"
            )
        laid.append(Span(phase, start, end))
        start = end
    return tuple(laid)


def _needed(phases: Sequence[Phase]) -> int:
    """Return the least number of steps that the phases fit into, a fraction of one step each."""
    whole = sum(int(phase.steps) for phase in phases if phase.steps is not None and phase.steps >= 1)
    shares = [phase.steps for phase in phases if isinstance(phase.steps, float)]
    least = whole + sum(phase.steps is None for phase in phases)
    if not shares:
        return least
    rest = 1 - sum(shares)
    needed = max(math.ceil(0.5 / min(shares)), least + len(shares))
    return max(needed, math.ceil(least / rest)) if rest > 1e-9 else needed


def at(laid: Sequence[Span], step: int) -> Span:
    """Return the span that optimiser step ``step`` (counted from 0) belongs to; the last one past the end."""
    return next((span for span in laid if span.start <= step < span.end), laid[-1])


def learning_rate_factor(laid: Sequence[Span], arguments: TrainingArguments) -> Callable[[int], float]:
    """Return step -> factor of the learning rate: TrainingArguments' schedule, begun anew at every restart.

    Raises:
        InputError: a schedule that is not a function of the step (``reduce_lr_on_plateau``).
    """
    starts = [0, *(span.start for span in laid if span.phase.restart and span.start)]
    ends = [*starts[1:], laid[-1].end]
    pieces = [_piece(arguments, end - start) for start, end in zip(starts, ends, strict=True)]

    def factor(step: int) -> float:
        index = max(index for index, start in enumerate(starts) if start <= step)
        return pieces[index](step - starts[index])

    return factor


def _piece(arguments: TrainingArguments, steps: int) -> Callable[[int], float]:
    options = arguments.lr_scheduler_kwargs
    placeholder = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=placeholder,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=options if isinstance(options, dict) else None,
    )
    lambdas: Sequence[Callable[[int], float]] | None = getattr(scheduler, "lr_lambdas", None)
    if not lambdas:
        raise InputError(
            f"lr_scheduler_type={arguments.lr_scheduler_type} is no function of the step, so a phase can't restart it; "
            "use linear, cosine, constant or another of that kind"
        )
    return lambdas[0]
