"""Lets Python read, during a trace, what depends on constants alone and what the model decides by values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ti_fx.frontend.checks import check, positions
from ti_fx.frontend.decisions import Decisions, count_of
from ti_fx.frontend.draws import HIGH, Draws
from ti_fx.frontend.source_lines import caller

# What takes sizes, which a model may give as tensors of one number.
SIZED = re.compile(
    "arange|empty|expand|full|narrow|new_empty|new_full|new_ones|new_zeros|ones|repeat|reshape|split|split_with_sizes|"
    "tile|unflatten|view|zeros"
)
# What makes a tensor of Python numbers that is then a size.
_OF_NUMBERS = (torch.div, torch.floor_divide, torch.tensor)
# What gives the places at which a mask is true.
_POSITIONS = (torch.nonzero, Tensor.nonzero, torch.where)
# What gives the same rows of a ``nonzero`` in another shape.
_SAME_ROWS = ("__getitem__", "flatten", "reshape", "squeeze", "to", "view")


def all_tensors(values: Any) -> list[Tensor]:
    """Return every tensor in nested values."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def index_numbers(index: Any) -> list[Tensor]:
    """Return the tensors of one number that an index reads: bounds of slices, and what lists hold."""
    parts = index if isinstance(index, tuple) else (index,)
    lists = [part for part in parts if isinstance(part, list | tuple)]
    bounds = [(part.start, part.stop, part.step) for part in parts if isinstance(part, slice)]
    return all_tensors((lists, bounds))


class _LoopedRows(list[Tensor]):
    """Rows that tell the mode of their trace while Python loops over them."""

    def __init__(self, mode: ConstantMode, rows: Iterable[Tensor]) -> None:
        super().__init__(rows)
        self.mode = mode

    def __iter__(self) -> Iterator[Tensor]:
        self.mode.looping += 1
        try:
            yield from super().__iter__()
        finally:
            self.mode.looping -= 1


class ConstantMode(TorchFunctionMode):
    """Computes what depends on the given integer tensors alone at once, in a trace, so that Python can read it.

    A single number drawn at random is one, too: what a layer is dropped by. It is all but 1 here, so that nothing is
    dropped; ``drawn`` says where, and :func:`ti_fx.frontend.randomness.decides_at_random` whether that matters. One
    that is drawn with a dimension (``torch.rand(1)``) is a node of the graph: what Python reads of it is fixed.

    With ``decisions``, what Python reads beyond that is recorded or replayed, and a loop over the rows of a mask's
    ``nonzero`` runs over every row that the mask has: what is not hit is empty there. ``loops`` says where, and
    whether any row was not hit; ``looping`` how many such loops are running now.
    """

    def __init__(
        self, values: Iterable[Tensor] = (), draw: float = HIGH, decisions: Decisions | None = None
    ) -> None:
        super().__init__()
        self.alive: list[Tensor] = list(values)  # an id means something only as long as its tensor lives
        self.constants = {id(value) for value in self.alive}
        self.draw = draw
        self.drawn: list[str] = []
        self.draws = Draws(draw)
        self.decisions = decisions
        self.rows: dict[int, Tensor] = {}  # every row that a nonzero, by its id, may have
        self.loops: dict[str, bool] = {}
        self.looping = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.rand and args in (([],), ((),)):
            self.drawn.append(caller())
            return self._at_once(torch.tensor, (self.draw,), kwargs)
        if self.draws.reads(func, args):
            self.drawn.append(caller())
            return self.draws.read(func, args)
        with self.draws.drawing(func):
            result = self._call(func, args, kwargs)
        self.draws.follow(func, args, kwargs, result)
        return result

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = all_tensors((args, kwargs))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            given += index_numbers(args[1])
        constants = [value for value in given if id(value) in self.constants]
        alone = len(constants) == len(given) if given else self._is_of_numbers(func)
        if self.decisions is not None and self.decisions.concerns(func, args):
            return self._decide(func, args, alone)
        if alone and _is_static(args, kwargs):
            return self._at_once(func, args, kwargs)
        numbers = self.decisions is not None and self.decisions.numbers
        if func is Tensor.__getitem__ and (constants or numbers):
            args = (args[0], self._indices(args[1], numbers))
        elif func is Tensor.__setitem__ and constants:
            args = (args[0], self._indices(args[1]), *args[2:])
        if numbers and func in _POSITIONS and len(args) == 1 and (parts := self._selected(args[0] != 0)):
            return tuple(parts) if func is torch.where or kwargs.get("as_tuple") else torch.stack(parts, -1)
        if self.decisions is None:
            return func(*args, **kwargs)
        if SIZED.fullmatch(getattr(func, "__name__", "")):
            args = (args[0], *pytree.tree_map(self._size, tuple(args[1:]))) if args else args
            kwargs = pytree.tree_map(self._size, kwargs)
        if len(given) == 1 and id(given[0]) in self.rows:
            return self._of_rows(func, args, kwargs, given[0])
        result = func(*args, **kwargs)
        if func in (torch.nonzero, Tensor.nonzero) and isinstance(result, Tensor) and given[0].dim() == 1:
            self._add_rows(result, given[0].shape[0])
        return result

    def _is_of_numbers(self, func: Any) -> bool:
        """Whether a call without tensors makes a constant that Python may read."""
        return (func is torch.arange and bool(self.alive)) or (
            self.decisions is not None and func in _OF_NUMBERS
        )

    def _at_once(self, func: Any, args: Any, kwargs: Any) -> Any:
        with _disable_current_modes():
            result = func(*args, **kwargs)
        for value in all_tensors(result):
            self.alive.append(value)
            self.constants.add(id(value))
        return result

    def _indices(self, index: Any, numbers: bool = False) -> Any:
        """Return an index with each constant mask, or any if ``numbers``, as the positions that it keeps."""
        parts: list[Any] = []
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, slice):
                part = slice(*(self._size(bound) for bound in (part.start, part.stop, part.step)))
            nested = all_tensors(part) if isinstance(part, list | tuple) else []
            if nested and all(id(one) in self.constants for one in nested):
                parts.append(self._at_once(torch.stack, (nested,), {}))
            elif not isinstance(part, Tensor) or id(part) not in self.constants:
                selects = numbers and isinstance(part, Tensor) and part.dtype == torch.bool
                parts += (self._selected(part) if selects else None) or [part]
            elif part.dtype == torch.bool:
                parts += self._at_once(torch.nonzero, (part,), {"as_tuple": True})
            else:
                parts.append(part if part.dim() else self._at_once(Tensor.item, (part,), {}))
        return tuple(parts)

    def _decide(self, func: Any, args: Any, alone: bool) -> Any:
        """Record or replay what Python reads; put a check of it into the graph unless it is a constant."""
        assert self.decisions is not None
        if self.decisions.recording:
            outcome = func(*args)
            self.decisions.record(outcome)
            return outcome
        decision = self.decisions.replay()
        if func is Tensor.__len__ and not free_unbacked_symbols(args[0].shape[:1]):
            return func(*args)
        if alone:
            return self._at_once(func, args, {})
        if decision is None:
            return func(*args)
        check(decision, func, args)
        return decision.outcome

    def _selected(self, mask: Tensor) -> list[Tensor] | None:
        """Return where a mask is true, at as many places as on the example; None while that is recorded."""
        assert self.decisions is not None
        if self.decisions.recording:
            self.decisions.record(int(count_of(mask)))
            return None
        if mask.dim() == 0 or (decision := self.decisions.replay()) is None:
            return None
        check(decision, count_of, (mask,))
        return positions(mask, int(decision.outcome))

    def _size(self, value: Any) -> Any:
        """Return a tensor of one whole number as that number, if it may be read."""
        if not isinstance(value, Tensor) or value.dim() or value.is_floating_point():
            return value
        if id(value) in self.constants:
            return self._at_once(Tensor.item, (value,), {})
        numbers = self.decisions is not None and self.decisions.numbers
        return self._decide(Tensor.item, (value,), False) if numbers else value

    def _add_rows(self, result: Tensor, count: Any) -> None:
        """Note every row that a ``nonzero`` may have, if the mask's size is a constant."""
        if isinstance(count, int):
            self.alive.append(result)
            with _disable_current_modes():
                self.rows[id(result)] = torch.arange(count)[:, None]

    def _of_rows(self, func: Any, args: Any, kwargs: Any, hit: Tensor) -> Any:
        """Follow the rows of a ``nonzero`` to a loop over them, which then runs over every row."""

        def instead(value: Any) -> Any:
            return self.rows[id(hit)] if value is hit else value

        name = getattr(func, "__name__", "")
        given = pytree.tree_map(instead, (args, kwargs))
        if name in ("unbind", "__iter__"):
            where = caller()
            assert self.decisions is not None
            if self.decisions.recording:
                self.loops[where] = self.loops.get(where, False) or len(hit) < len(self.rows[id(hit)])
            return _LoopedRows(self, self._at_once(func, *given))
        result = func(*args, **kwargs)
        if name in _SAME_ROWS and isinstance(result, Tensor) and _is_static(args, kwargs):
            with _disable_current_modes():
                rows = func(*given[0], **given[1])
            if len(rows) == len(self.rows[id(hit)]):
                self.alive.append(result)
                self.rows[id(result)] = rows
        return result


def _is_static(args: Any, kwargs: Any) -> bool:
    return not any(isinstance(leaf, torch.SymInt) for leaf in pytree.tree_leaves((args, kwargs)))
