"""A graph refuses, in one line, inputs that it was not captured for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ti_fx.errors import InputError
from ti_fx.ir.assumptions import require
from ti_fx.ir.edit import constant_size
from ti_fx.ir.facts import facts


def distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by name, with a copy of one that was given twice: a trace takes it for a single input."""
    first: dict[int, str] = {}
    return {
        name: value if first.setdefault(id(value), name) == name else value.clone()
        for name, value in tensors.items()
    }


def validate_inputs(gm: GraphModule) -> None:
    """Refuse inputs that the graph was not captured for, in the graph and in every deep copy of it."""
    gm.register_forward_pre_hook(require_inputs, with_kwargs=True)
    if facts(gm).sizes.assumptions:
        validate_compiled(gm)
    gm._register_deepcopy_hook(validate_inputs)


def validate_compiled(gm: GraphModule) -> None:
    """Refuse sizes that the graph does not take in code that torch.compile makes of it, too."""
    gm.register_forward_pre_hook(_Compiled(gm), with_kwargs=True)


class _Compiled:
    """Evaluates what is assumed of sizes on torch.compile's symbols, which it keeps as guards of the compiled code."""

    def __init__(self, gm: GraphModule) -> None:
        sizes = facts(gm).sizes
        self.inputs = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
        self.assumptions = [one for one in sizes.assumptions if one.in_graph]
        self.places: dict[str, tuple[str, int]] = {}
        for node in gm.graph.find_nodes(op="placeholder"):
            for index, size in enumerate(node.meta["val"].shape):
                if (name := sizes.names.get(str(size))) is not None:
                    self.places.setdefault(name, (str(node.target), index))
        self._find()

    def _find(self) -> None:
        self.rows = [
            (one.condition, [self.places[name] for name in one.names], str(one))
            for one in self.assumptions
            if all(name in self.places for name in one.names)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._find()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse sizes, while torch.compile traces the graph and where it gives up; ``require_inputs`` says more."""
        given = {**dict(zip(self.inputs, args, strict=False)), **kwargs}
        for condition, places, said in self.rows:
            if not condition(*[given[name].shape[index] for name, index in places]):
                raise InputError(f"these sizes are not what the graph was captured for: {said}")


def require_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse inputs that the graph was not captured for.

    Raises:
        InputError: names the input, and what the graph takes.
    """
    if torch.compiler.is_compiling():
        return
    assert isinstance(module, GraphModule)
    placeholders = module.graph.find_nodes(op="placeholder")
    names = [str(node.target) for node in placeholders]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if set(given) != set(names):
        raise InputError(f"the graph takes the inputs {', '.join(names)}; got {', '.join(given) or 'none'}")
    if len(args) + len(kwargs) > len(names):
        raise InputError(f"the graph takes the inputs {', '.join(names)}; some are given twice")
    for node in placeholders:
        _validate_kind(module, node, given[str(node.target)])
    sizes: dict[str, tuple[int, str]] = {}
    dimensions = [
        (str(node.target), index, size, wanted)
        for node in placeholders
        for index, (size, wanted) in enumerate(
            zip(given[str(node.target)].shape, node.meta["val"].shape, strict=True)
        )
    ]
    known = facts(module).sizes
    for name, index, size, wanted in dimensions:
        _validate_size(name, index, size, wanted, sizes, known.smallest.get(str(wanted)))
    assumed = tuple(one for one in known.assumptions if one.in_graph)
    require(assumed, {known.names[one]: size for one, (size, _) in sizes.items() if one in known.names})
    for name, index, size, wanted in dimensions:
        _validate_bounds(name, index, size, wanted, known.smallest.get(str(wanted)))
    for name, baked in facts(module).baked.items():
        value = given[name]
        if not value.is_meta and not torch.equal(value, baked.to(value.device)):
            raise InputError(
                f"input {name!r} steers Python in the model, so the graph has the captured values as constants; "
                "give those, or capture with these"
            )


def _validate_kind(module: GraphModule, node: Node, value: Any) -> None:
    expected, name = node.meta["val"], str(node.target)
    device = next((parameter.device for parameter in module.parameters()), None)
    if not isinstance(value, Tensor):
        raise InputError(f"input {name!r} is a {type(value).__name__}; give a tensor")
    require_plain(name, value)
    if value.dtype != expected.dtype:
        raise InputError(f"input {name!r} is {value.dtype}; the graph was captured with {expected.dtype}")
    if device is not None and value.device != device:
        raise InputError(f"input {name!r} is on {value.device}; the graph is on {device}")
    if value.dim() != expected.dim():
        raise InputError(f"input {name!r} has {value.dim()} dimensions; the graph takes {expected.dim()}")


def require_plain(name: str, value: Tensor) -> None:
    """Refuse a tensor that is not one block of values: a nested or a sparse one.

    Raises:
        InputError: names the input, and what to make of it.
    """
    if value.is_nested:
        raise InputError(
            f"input {name!r} is a nested tensor, and a graph takes rows of one length; pad it with "
            "torch.nested.to_padded_tensor, and give the model a mask"
        )
    if value.layout is not torch.strided:
        raise InputError(f"input {name!r} is a {value.layout} tensor; give a dense one: .to_dense()")


def _validate_size(
    name: str,
    index: int,
    size: int,
    wanted: Any,
    sizes: dict[str, tuple[int, str]],
    smallest: int | None,
) -> None:
    """``smallest``: what was found to work below the trace's own bound (a cache that is empty); None: that bound."""
    constant = constant_size(wanted)
    if size == 0 and constant != 0 and smallest != 0:
        raise InputError(f"input {name!r} has size 0 in dimension {index}; give at least 1")
    if constant is not None:
        if size != constant:
            raise InputError(
                f"input {name!r} has size {size} in dimension {index}; the graph was captured for {constant}"
            )
        return
    known, where = sizes.setdefault(str(wanted), (size, f"{name!r} dimension {index}"))
    if known != size:
        raise InputError(
            f"input {name!r} has size {size} in dimension {index}, but {where} has {known}; they must be equal"
        )


def _validate_bounds(name: str, index: int, size: int, wanted: Any, smallest: int | None) -> None:
    if constant_size(wanted) is not None:
        return
    bounds = wanted.node.shape_env.bound_sympy(wanted.node.expr)
    if bounds.upper.is_Integer and size > int(bounds.upper):
        raise InputError(
            f"input {name!r} has size {size} in dimension {index}; the model takes at most {int(bounds.upper)}"
        )
    # every dynamic size is taken for at least 2 by the trace
    if smallest is None and size < int(bounds.lower) and int(bounds.lower) > 2:
        raise InputError(
            f"input {name!r} has size {size} in dimension {index}; the model takes at least {int(bounds.lower)}"
        )
