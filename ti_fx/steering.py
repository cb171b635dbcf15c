"""Integer inputs whose values a model turns into Python numbers: image grids, sequence lengths, layout flags.

One graph can't follow what Python decides by such values, so they are constants of the trace, recorded with the graph,
which refuses others. Token ids are never taken for constants.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

# What turns a tensor's values into Python numbers or into sizes.
_READS = frozenset(
    (
        "tolist",
        "item",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "numpy",
        "nonzero",
        "unique",
        "unique_consecutive",
        "masked_select",
        "equal",
    )
)
# What gives the same token ids in another place.
_MOVES = frozenset(
    (
        "view",
        "reshape",
        "__getitem__",
        "flatten",
        "expand",
        "contiguous",
        "to",
        "long",
        "int",
        "clone",
        "unsqueeze",
        "squeeze",
        "transpose",
        "masked_fill",
        "where",
        "cat",
        "pad",
        "clamp",
    )
)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


class _Taint(TorchFunctionMode):
    """Follows inputs through a forward: into Python, and into the indices of embeddings."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.alive: list[Tensor] = list(
            inputs.values()
        )  # an id means something only as long as its tensor lives
        self.sources = {id(value): frozenset((name,)) for name, value in inputs.items()}
        self.ids = dict(self.sources)  # inputs that a tensor has the numbers of
        self.read: set[str] = set()
        self.looked_up: set[str] = set()

    def of(self, values: Any, known: Mapping[int, frozenset[str]] | None = None) -> frozenset[str]:
        """Return the inputs that the values come from."""
        known = self.sources if known is None else known
        return frozenset().union(*(known.get(id(value), frozenset()) for value in _tensors(values)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        sources = self.of((args, kwargs))
        if name in _READS:
            self.read |= sources
        elif name == "repeat_interleave" and len(args) > 1:
            self.read |= self.of(args[1])
        elif name == "embedding":
            self.looked_up |= self.of(args[0], self.ids)
        result = func(*args, **kwargs)
        ids = self.of((args, kwargs), self.ids) if name in _MOVES else frozenset()
        for value in _tensors(result):
            self.alive.append(value)
            self.sources[id(value)] = sources
            self.ids[id(value)] = ids
        return result


def steering_inputs(
    model: nn.Module, tensors: Mapping[str, Tensor], constants: Mapping[str, Any]
) -> list[str]:
    """Return the integer inputs whose values steer Python in the model's forward, token ids excepted."""
    integers = {name: value for name, value in tensors.items() if not value.is_floating_point()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _Taint(integers) as taint:
        model(**tensors, **constants)
    return [name for name in integers if name in taint.read - taint.looked_up]


class Concrete(TorchFunctionMode):
    """During a trace, computes what depends on the given integer tensors alone at once, so that Python can read it.

    A single number drawn at random is one, too: what a layer is dropped by. It is 1 here, so that nothing is dropped;
    ``drawn`` says where, and :func:`decides_at_random` whether that matters.
    """

    def __init__(self, values: Iterable[Tensor] = (), draw: float = 1.0) -> None:
        super().__init__()
        self.alive: list[Tensor] = list(values)
        self.known = {id(value) for value in self.alive}
        self.draw = draw
        self.drawn: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.rand and args in (([],), ((),)):
            self.drawn.append(_caller())
            return self._at_once(torch.tensor, (self.draw,), kwargs)
        given = _tensors((args, kwargs))
        concrete = [value for value in given if id(value) in self.known]
        alone = len(concrete) == len(given) if given else func is torch.arange and bool(self.alive)
        if alone and _is_static(args, kwargs):
            return self._at_once(func, args, kwargs)
        if concrete and func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], self._indices(args[1]), *args[2:])
        return func(*args, **kwargs)

    def _at_once(self, func: Any, args: Any, kwargs: Any) -> Any:
        with _disable_current_modes():
            result = func(*args, **kwargs)
            if func is Tensor.__iter__:
                result = list(result)
        for value in _tensors(result):
            self.alive.append(value)
            self.known.add(id(value))
        return iter(result) if func is Tensor.__iter__ else result

    def _indices(self, index: Any) -> Any:
        """Return an index with each known mask as the positions that it keeps, whose number is known."""
        parts: list[Any] = []
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, Tensor) and part.dtype == torch.bool and id(part) in self.known:
                parts += self._at_once(torch.nonzero, (part,), {"as_tuple": True})
            else:
                parts.append(part)
        return tuple(parts)


def _is_static(args: Any, kwargs: Any) -> bool:
    return not any(isinstance(leaf, torch.SymInt) for leaf in pytree.tree_leaves((args, kwargs)))


def _caller() -> str:
    """Return ``file:line`` of the innermost frame that is neither torch's nor ours."""
    frames = traceback.extract_stack()
    outside = (
        frame for frame in reversed(frames) if not re.search(r"[/\\](torch|ti_fx)[/\\]", frame.filename)
    )
    frame = next(outside)
    return f"{frame.filename}:{frame.lineno}"


def decides_at_random(
    model: nn.Module, tensors: Mapping[str, Tensor], constants: Mapping[str, Any]
) -> str | None:
    """Return where the model, in its present mode, draws a number that changes what it computes; None if nowhere."""
    outputs = []
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for draw in (1.0, 0.0):
        with torch.no_grad(), torch.random.fork_rng(devices=[]), Concrete(draw=draw) as concrete:
            torch.manual_seed(0)
            outputs.append(_tensors(model(**tensors, **constants)))
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        if not concrete.drawn:
            return None
    left, right = outputs
    same = len(left) == len(right) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(left, right, strict=True)
    )
    return None if same else concrete.drawn[0]
