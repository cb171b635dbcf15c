"""Refuses random numbers that decide in Python what a model computes: a trace would freeze one outcome."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ti_fx.errors import RandomnessError
from ti_fx.frontend.constant_mode import ConstantMode, all_tensors
from ti_fx.frontend.model_for_trace import unchanged_buffers
from ti_fx.frontend.source_lines import caller, drawing_line
from ti_fx.numerics.closeness import same

_RANDOM_FUNCTIONS = ("randint", "choice", "choices", "sample", "shuffle", "gauss", "randrange")
_NUMPY_FUNCTIONS = (
    "rand",
    "random",
    "uniform",
    "randint",
    "choice",
    "permutation",
    "normal",
    "randn",
    "shuffle",
)


@contextmanager
def _python_draws(draw: float) -> Iterator[list[str]]:
    """Let Python's uniform random numbers be at one end of their range; yield where they are drawn."""
    drawn: list[str] = []

    def uniform(low: float = 0.0, high: float = 1.0) -> float:
        drawn.append(caller())
        return low + (high - low) * draw

    before = random.random, random.uniform
    random.random, random.uniform = uniform, uniform  # type: ignore[assignment]
    try:
        yield drawn
    finally:
        random.random, random.uniform = before


@contextmanager
def no_python_randomness(model: nn.Module) -> Iterator[None]:
    """Raise if the model decides anything by Python's or NumPy's random numbers: the trace would bake one outcome.

    Uniform ones are at the upper end, where nothing is dropped; :func:`decides_at_random` says whether that matters.
    """
    import numpy

    found: list[str] = []

    def recording(function: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if line := drawing_line():
                found.append(line)
            return function(*args, **kwargs)

        return recorded

    modules: tuple[tuple[Any, tuple[str, ...]], ...] = (
        (random, _RANDOM_FUNCTIONS),
        (numpy.random, _NUMPY_FUNCTIONS),
    )
    with ExitStack() as undo:
        undo.callback(random.setstate, random.getstate())
        undo.callback(numpy.random.set_state, numpy.random.get_state())
        for module, names in modules:
            for name in names:
                function = getattr(module, name)
                undo.callback(setattr, module, name, function)
                setattr(module, name, recording(function))
        with _python_draws(1.0) as drawn:
            yield
        if any(parameter.is_meta for parameter in model.parameters()):
            found += drawn  # there are no values to see whether they matter
    if found:
        raise RandomnessError(
            f"{type(model).__name__} draws random numbers in Python ({found[0]}), which a trace would freeze into one "
            "outcome; turn that off (layerdrop=0, apply_spec_augment=False, ...) or draw them with torch"
        )


def decides_at_random(
    model: nn.Module, tensors: Mapping[str, Tensor], constants: Mapping[str, Any]
) -> str | None:
    """Return where the model, in its present mode, draws a number that changes what it computes; None if nowhere."""
    outputs = []
    for draw in (1.0, 0.0):
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            unchanged_buffers(model),
            ConstantMode(draw=draw) as mode,
            _python_draws(draw) as drawn,
        ):
            torch.manual_seed(0)
            outputs.append(all_tensors(model(**tensors, **constants)))
        found = [*mode.drawn, *drawn]
        if not found:
            return None
    left, right = outputs
    alike = len(left) == len(right) and all(map(same, left, right))
    return None if alike else found[0]
