"""A graph refuses, in one line, inputs that it was not captured for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.errors import InputError
from ti_fx.ir.edit import constant_size
from ti_fx.ir.facts import facts


def validate_inputs(gm: GraphModule) -> None:
    """Refuse inputs that the graph was not captured for, in the graph and in every deep copy of it."""
    gm.register_forward_pre_hook(require_inputs, with_kwargs=True)
    gm._register_deepcopy_hook(validate_inputs)


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
    device = next((parameter.device for parameter in module.parameters()), None)
    sizes: dict[str, tuple[int, str]] = {}
    for node in placeholders:
        expected, value, name = node.meta["val"], given[str(node.target)], str(node.target)
        if not isinstance(value, Tensor):
            raise InputError(f"input {name!r} is a {type(value).__name__}; give a tensor")
        require_plain(name, value)
        if value.dtype != expected.dtype:
            raise InputError(f"input {name!r} is {value.dtype}; the graph was captured with {expected.dtype}")
        if device is not None and value.device != device:
            raise InputError(f"input {name!r} is on {value.device}; the graph is on {device}")
        if value.dim() != expected.dim():
            raise InputError(f"input {name!r} has {value.dim()} dimensions; the graph takes {expected.dim()}")
        for index, (size, wanted) in enumerate(zip(value.shape, expected.shape, strict=True)):
            smallest = facts(module).sizes.smallest.get(str(wanted))
            _validate_size(name, index, size, wanted, sizes, smallest)
        baked = facts(module).baked.get(name)
        if baked is not None and not value.is_meta and not torch.equal(value, baked.to(value.device)):
            raise InputError(
                f"input {name!r} steers Python in the model, so the graph has the captured values as constants; "
                "give those, or capture with these"
            )


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
    symbol = wanted.node.expr
    known, where = sizes.setdefault(str(symbol), (size, f"{name!r} dimension {index}"))
    if known != size:
        raise InputError(
            f"input {name!r} has size {size} in dimension {index}, but {where} has {known}; they must be equal"
        )
    bounds = wanted.node.shape_env.bound_sympy(symbol)
    if bounds.upper.is_Integer and size > int(bounds.upper):
        raise InputError(
            f"input {name!r} has size {size} in dimension {index}; the model takes at most {int(bounds.upper)}"
        )
    # every dynamic size is taken for at least 2 by the trace
    if smallest is None and size < int(bounds.lower) and int(bounds.lower) > 2:
        raise InputError(
            f"input {name!r} has size {size} in dimension {index}; the model takes at least {int(bounds.lower)}"
        )
