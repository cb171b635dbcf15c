"""An Undo puts a graph back as it was before a pipeline: nodes, facts, tensors and their values, sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ti_fx.ir.edit import copy_graph
from ti_fx.ir.shapes import forget, sizes_of

_CONTAINERS = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


class Undo:
    """What is needed to put a graph back. The nodes are new objects then; tensors and modules are the same ones.

    Values are copied when they are first written, within :meth:`watching`.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.graph = copy_graph(gm.graph)
        self.meta = dict(gm.meta)
        # a container may be shared with forks, so it gets its content back
        self.containers = [
            (module, name, held := getattr(module, name), held.copy())
            for module in gm.modules()
            for name in _CONTAINERS
        ]
        self.modes = [(module, module.training) for module in gm.modules()]
        self.tensors = [
            (value, value.detach(), value.requires_grad) for value in (*gm.parameters(), *gm.buffers())
        ]
        self.writes = _Writes({_storage(value) for value, _, _ in self.tensors})
        self.sizes = _Sizes(sizes_of(gm))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Copy the values of the graph's tensors before they are written."""
        with self.writes:
            yield

    def __call__(self) -> None:
        """Put the graph back."""
        gm = self.gm
        for module, name, held, content in self.containers:
            held.clear()
            held.update(content)
            setattr(module, name, held)
        for module, training in self.modes:
            module.training = training
        for value, data, requires_grad in self.tensors:
            if _storage(value) != _storage(data):
                value.data = data
            value.requires_grad_(requires_grad)
        self.writes.undo()
        self.sizes.undo()
        forget(gm)
        gm.meta.clear()
        gm.meta.update(self.meta)
        gm.graph = self.graph


class _Sizes:
    """What is assumed of the symbolic sizes; a pass that decides by one adds to it, for every graph with that size."""

    def __init__(self, environment: ShapeEnv | None) -> None:
        self.environment = environment
        if environment is None:
            return
        self.guards = len(environment.guards)
        self.held: dict[str, Any] = {
            name: getattr(environment, name).copy()
            for name in ("replacements", "replacements_slocs", "var_to_range", "divisible")
        }

    def undo(self) -> None:
        environment = self.environment
        if environment is None:
            return
        del environment.guards[self.guards :]
        for name, content in self.held.items():
            held = getattr(environment, name)
            held.clear()
            held.update(content)
        # what was simplified by the assumptions that are gone is simplified anew
        environment._version_counter += 1
        environment._replacements_version_counter += 1


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies the values of some storages before an operator writes into one of them."""

    def __init__(self, storages: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = storages
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func._schema.is_mutable:
            for value in _written(func, args, kwargs):
                self._keep(value)
        return func(*args, **kwargs)

    def _keep(self, value: Tensor) -> None:
        key = _storage(value)
        if key in self.storages and key not in self.copies:
            whole = value.detach().as_strided(
                (value.untyped_storage().nbytes() // value.element_size(),), (1,), 0
            )
            self.copies[key] = whole, whole.clone()

    def undo(self) -> None:
        with torch.no_grad():
            for whole, copy in self.copies.values():
                whole.copy_(copy)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)
