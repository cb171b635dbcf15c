"""Fixes what Python reads of single random numbers: a tensor of one number that is drawn, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ti_fx.frontend.decisions import READS

# The ends of what uniform random numbers are: at least 0, below 1. Neither 0 itself, which is as good as never drawn.
LOW, HIGH = 2.0**-24, 1 - 2.0**-24

_UNIFORM = (torch.rand, torch.rand_like, Tensor.uniform_)
_BERNOULLI = (torch.bernoulli, Tensor.bernoulli, Tensor.bernoulli_)
# What makes one number of Python's: what a draw is compared with, or its probability.
_NUMBERS = (torch.tensor, torch.full, torch.ones, torch.zeros, torch.as_tensor)


class Draws:
    """Single random numbers of a forward, each at one end of its range, and what follows from them alone.

    Args:
        draw: where uniform numbers between 0 and 1 are: ``LOW`` or ``HIGH``.
    """

    def __init__(self, draw: float) -> None:
        self.draw = draw
        self.values: dict[int, Tensor] = {}  # what is known of a tensor of one number, by its id
        self.random: set[int] = set()
        self.alive: list[Tensor] = []  # an id means something only as long as its tensor lives
        self.last: tuple[Tensor, Tensor] | None = (
            None  # the generator's state before and after the latest draw
        )

    def reads(self, func: Any, args: Any) -> bool:
        """Whether Python reads a number that was drawn, or computed from one."""
        return (
            bool(self.random) and func in READS and isinstance(args[0], Tensor) and id(args[0]) in self.random
        )

    def read(self, func: Any, args: Any) -> Any:
        """Return what it reads; the number counts as not drawn, as it is not in a graph, where nobody else reads it."""
        with _disable_current_modes():
            if self.last is not None and torch.equal(self.last[1], torch.get_rng_state()):
                torch.set_rng_state(self.last[0])
            return func(self.values[id(args[0])], *args[1:])

    @contextmanager
    def drawing(self, func: Any) -> Iterator[None]:
        """Note the generator's state around a draw."""
        if func not in (*_UNIFORM, *_BERNOULLI):
            yield
            return
        before = torch.get_rng_state()
        yield
        self.last = before, torch.get_rng_state()

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note what a call gives, if it is one number that is drawn or follows from known ones alone."""
        if not isinstance(result, Tensor) or not all(
            type(size) is int and size == 1 for size in result.shape
        ):
            return
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        with _disable_current_modes():
            if func in _UNIFORM:
                low, high = self._bounds(func, args, kwargs)
                self._note(result, torch.full(result.shape, low + (high - low) * self.draw), True)
            elif func in _BERNOULLI:
                probability = self._probability(args, kwargs)
                if probability is not None:
                    self._note(result, torch.full(result.shape, float(self.draw < probability)), True)
            elif func in _NUMBERS and not given:
                kept = {name: value for name, value in kwargs.items() if name != "device"}
                self._note(result, func(*args, **kept), False)
            elif given and all(id(value) in self.values for value in given):
                known = pytree.tree_map(self._known, (args, kwargs))
                self._note(
                    result, func(*known[0], **known[1]), any(id(value) in self.random for value in given)
                )

    def _note(self, result: Tensor, value: Any, drawn: bool) -> None:
        if isinstance(value, Tensor):
            self.alive.append(result)
            self.values[id(result)] = value
            if drawn:
                self.random.add(id(result))

    def _known(self, leaf: Any) -> Any:
        return self.values[id(leaf)].clone() if isinstance(leaf, Tensor) else leaf

    def _bounds(self, func: Any, args: Any, kwargs: Any) -> tuple[float, float]:
        if func is not Tensor.uniform_:
            return 0.0, 1.0
        low, high = (*args[1:], *(0.0, 1.0)[len(args[1:]) :])[:2]
        return kwargs.get("from", low), kwargs.get("to", high)

    def _probability(self, args: Any, kwargs: Any) -> float | None:
        """Return the probability of a Bernoulli draw, None if it is not known."""
        own = kwargs.get("p", args[1] if len(args) > 1 else None)
        if isinstance(own, int | float):
            return float(own)
        value = self.values.get(id(args[0] if own is None else own))
        return None if value is None else float(value)
