"""Finds the integer inputs whose values a model turns into Python numbers: image grids, lengths, layout flags.

One graph can't follow what Python decides by such values, so they are constants of the trace, recorded with the graph,
which refuses others. Token ids are never taken for constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ti_fx.frontend.constant_mode import SIZED, all_tensors, index_numbers
from ti_fx.frontend.model_for_trace import unchanged_buffers

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


class _InputTracker(TorchFunctionMode):
    """Follows inputs through a forward: into Python, and into the indices of embeddings."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        # an id means something only as long as its tensor lives
        self.alive: list[Tensor] = list(inputs.values())
        self.sources = {id(value): frozenset((name,)) for name, value in inputs.items()}
        self.ids = dict(self.sources)  # inputs that a tensor has the numbers of
        self.read: set[str] = set()
        self.looked_up: set[str] = set()

    def of(self, values: Any, known: Mapping[int, frozenset[str]] | None = None) -> frozenset[str]:
        """Return the inputs that the values come from."""
        known = self.sources if known is None else known
        return frozenset().union(*(known.get(id(value), frozenset()) for value in all_tensors(values)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        sources = self.of((args, kwargs))
        if name in _READS:
            self.read |= sources
        elif name in ("__getitem__", "__setitem__"):
            self.read |= self.of(index_numbers(args[1]))
        elif SIZED.fullmatch(name):
            self.read |= self.of([value for value in all_tensors(args[1:]) if not value.dim()])
        elif name == "repeat_interleave" and len(args) > 1:
            self.read |= self.of(args[1])
        elif name == "embedding":
            self.looked_up |= self.of(args[0], self.ids)
        result = func(*args, **kwargs)
        ids = self.of((args, kwargs), self.ids) if name in _MOVES else frozenset()
        for value in all_tensors(result):
            self.alive.append(value)
            self.sources[id(value)] = sources
            self.ids[id(value)] = ids
        return result


def inputs_read_by_python(
    model: nn.Module, tensors: Mapping[str, Tensor], constants: Mapping[str, Any]
) -> list[str]:
    """Return the integer inputs whose values Python reads in the model's forward, token ids excepted."""
    integers = {name: value for name, value in tensors.items() if not value.is_floating_point()}
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        unchanged_buffers(model),
        _InputTracker(integers) as tracker,
    ):
        model(**tensors, **constants)
    return [name for name in integers if name in tracker.read - tracker.looked_up]
