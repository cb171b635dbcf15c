"""Binds an example to a model's forward: its tensors become the graph's inputs, everything else a constant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ti_fx.errors import InputError
from ti_fx.ir.inputs import distinct, require_plain

# Keywords that ask for a cache, which a training graph has not. XLNet's exists in evaluation alone.
CACHES = ("use_cache", "use_mems")


def bind_example(
    model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the example's tensors and its other values by keyword; a model that can cache is told not to.

    Raises:
        InputError: the example does not fit the model's signature, holds no tensor, nests some, or is on another
            device than the model.
    """
    signature = inspect.signature(model.forward)
    arguments = _arguments(model, signature, example)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    constants = {name: value for name, value in arguments.items() if name not in tensors}
    for name, value in constants.items():
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            raise InputError(
                f"input {name!r} nests tensors in a {type(value).__name__}; give each tensor a keyword"
            )
    for name, value in tensors.items():
        require_plain(name, value)
    if not tensors:
        raise InputError("the example holds no tensor; give at least one input tensor")
    stored = {parameter.device for parameter in model.parameters()}
    if stored == {torch.device("meta")}:
        tensors = {name: value.to("meta") for name, value in tensors.items()}
    devices = stored | {value.device for value in tensors.values()}
    if len(devices) > 1:
        raise InputError(f"model and example are on different devices: {sorted(map(str, devices))}")
    for name in CACHES:
        if name in signature.parameters:
            constants.setdefault(name, False)
    return distinct(tensors), constants


def _arguments(
    model: nn.Module, signature: inspect.Signature, example: Mapping[str, Any] | tuple[Any, ...]
) -> dict[str, Any]:
    try:
        bound = signature.bind(**example) if isinstance(example, Mapping) else signature.bind(*example)
    except TypeError as error:
        known = ", ".join(signature.parameters)
        raise InputError(
            f"the example does not fit {type(model).__name__}.forward({known}): {error}"
        ) from None
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise InputError(f"{type(model).__name__}.forward takes *{name}; give the model named inputs")
        else:
            arguments[name] = value
    return arguments


def rows_for_trace(
    tensors: dict[str, Tensor], runs: Callable[[dict[str, Tensor]], bool]
) -> dict[str, Tensor]:
    """Repeat the batch where there is one row, as torch.export takes a size of 1 for a constant.

    Where some inputs have one row and others several, each of those is a batch of its own (one image, two texts) if the
    model runs with several, and stays one row if not (positions that all rows share).

    Args:
        tensors: the example.
        runs: whether the model takes these inputs.
    """
    single = [name for name, value in tensors.items() if value.dim() and value.shape[0] == 1]
    sizes = {value.shape[0] for value in tensors.values() if value.dim()}
    count = next(size for size in range(2, len(sizes) + 3) if size not in sizes)
    grown = {name: torch.cat([tensors[name]] * count) for name in single}
    if len(sizes) <= 1 or not grown or runs({**tensors, **grown}):
        return {**tensors, **grown}
    found = dict(tensors)
    for name, value in grown.items():
        if runs({**found, name: value}):
            found[name] = value
    return found
