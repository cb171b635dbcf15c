"""Refuses random numbers that decide in Python what a model computes: a trace would freeze one outcome."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ti_fx.errors import RandomnessError
from ti_fx.frontend.constant_mode import ConstantMode, all_tensors
from ti_fx.frontend.draws import HIGH, LOW
from ti_fx.frontend.model_for_trace import unchanged_buffers
from ti_fx.frontend.source_lines import caller, drawing_line
from ti_fx.numerics.closeness import same

_RANDOM_FUNCTIONS = ("randint", "choice", "choices", "sample", "shuffle", "gauss", "randrange")
_NUMPY_FUNCTIONS = (
    "rand",
    "random",
    "random_sample",
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
    """Let Python's and NumPy's single uniform numbers be at one end of their range; yield where they are drawn."""
    import numpy

    drawn: list[str] = []

    def uniform(low: float = 0.0, high: float = 1.0) -> float:
        drawn.append(caller())
        return low + (high - low) * draw

    def of_numpy(function: Any, takes_bounds: bool) -> Any:
        def number(*args: Any, **kwargs: Any) -> Any:
            if not takes_bounds and not args and kwargs.get("size") is None:
                return uniform()
            if takes_bounds and len(args) < 3 and kwargs.get("size") is None:
                return uniform(*args, **{name: value for name, value in kwargs.items() if name != "size"})
            return function(*args, **kwargs)

        return number

    places: list[tuple[Any, str, Any]] = [(random, name, uniform) for name in ("random", "uniform")]
    for name in ("rand", "random", "random_sample", "uniform"):
        places.append((numpy.random, name, of_numpy(getattr(numpy.random, name), name == "uniform")))
    with ExitStack() as undo:
        for module, name, function in places:
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, function)
        yield drawn


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
        with _python_draws(HIGH) as drawn, _own_generators(model) as own:
            yield
            found += own()
        if any(parameter.is_meta for parameter in model.parameters()):
            found += drawn  # there are no values to see whether they matter
    if found:
        raise RandomnessError(
            f"{type(model).__name__} draws random numbers in Python ({found[0]}), which a trace would freeze into one "
            "outcome; turn that off (layerdrop=0, apply_spec_augment=False, ...) or draw them with torch"
        )


@contextmanager
def _own_generators(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Yield what says which generators of Python's or NumPy's that modules keep have drawn numbers meanwhile."""
    import numpy

    def state(generator: Any) -> str:
        if isinstance(generator, numpy.random.Generator):
            return str(generator.bit_generator.state)
        return str(
            generator.get_state() if isinstance(generator, numpy.random.RandomState) else generator.getstate()
        )

    kinds = (random.Random, numpy.random.Generator, numpy.random.RandomState)
    before = [
        (f"{path}.{name}".lstrip("."), value, state(value))
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, kinds)
    ]
    yield lambda: [name for name, generator, known in before if state(generator) != known]


def decides_at_random(
    model: nn.Module, tensors: Mapping[str, Tensor], constants: Mapping[str, Any]
) -> str | None:
    """Return where the model, in its present mode, draws a number that changes what it computes; None if nowhere."""
    outputs = []
    for draw in (HIGH, LOW):
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
