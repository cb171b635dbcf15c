"""Integer inputs whose values a model turns into Python numbers: image grids, sequence lengths, layout flags.

One graph can't follow what Python decides by such values, so they are constants of the trace, recorded with the graph,
which refuses others. Token ids are never taken for constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

# What turns a tensor's values into Python numbers or into sizes.
_READS = frozenset(
    "tolist item __bool__ __int__ __float__ __index__ numpy nonzero unique unique_consecutive masked_select equal".split()
)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


class _Taint(TorchFunctionMode):
    """Follows inputs through a forward: into Python, and into the indices of embeddings."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.alive: list[Tensor] = list(inputs.values())  # an id means something only as long as its tensor lives
        self.sources = {id(value): frozenset((name,)) for name, value in inputs.items()}
        self.read: set[str] = set()
        self.looked_up: set[str] = set()

    def of(self, values: Any) -> frozenset[str]:
        """Return the inputs that the values come from."""
        return frozenset().union(*(self.sources.get(id(value), frozenset()) for value in _tensors(values)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        sources = self.of((args, kwargs))
        if name in _READS:
            self.read |= sources
        elif name == "repeat_interleave" and len(args) > 1:
            self.read |= self.of(args[1])
        elif name == "embedding":
            self.looked_up |= self.of(args[0])
        result = func(*args, **kwargs)
        for value in _tensors(result):
            self.alive.append(value)
            self.sources[id(value)] = sources
        return result


def steering_inputs(model: nn.Module, tensors: Mapping[str, Tensor], constants: Mapping[str, Any]) -> list[str]:
    """Return the integer inputs whose values steer Python in the model's forward, token ids excepted."""
    integers = {name: value for name, value in tensors.items() if not value.is_floating_point()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _Taint(integers) as taint:
        model(**tensors, **constants)
    return [name for name in integers if name in taint.read - taint.looked_up]


class Concrete(TorchFunctionMode):
    """During a trace, computes what depends on the given integer tensors alone at once, so that Python can read it."""

    def __init__(self, values: Iterable[Tensor]) -> None:
        super().__init__()
        self.alive: list[Tensor] = list(values)
        self.known = {id(value) for value in self.alive}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        if not given or not all(id(value) in self.known for value in given):
            return func(*args, **kwargs)
        with _disable_current_modes():
            result = func(*args, **kwargs)
        for value in _tensors(result):
            self.alive.append(value)
            self.known.add(id(value))
        return result
