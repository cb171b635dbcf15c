"""Changes a model for a trace and puts it back as it was: its forward, its buffers, the cache that it returns."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def whole_numbers_stay(model: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """Take the model's buffers of one whole number (a stride, a kernel's size) for constants, and yield them."""
    found = [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
        and buffer.numel() == 1
        and not (buffer.is_floating_point() or buffer.is_complex())
    ]
    before = [(module, dict(module._buffers)) for module in {id(one[0]): one[0] for one in found}.values()]
    try:
        for module, name, buffer in found:
            del module._buffers[name]
            module.__dict__[name] = buffer
        yield tuple(buffer for _, _, buffer in found)
    finally:
        for module, name, _ in found:
            del module.__dict__[name]
        for module, buffers in before:
            module._buffers.clear()
            module._buffers.update(buffers)  # in their order, which state_dict() has


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Put every buffer's values back as they were: running statistics change with every forward in training."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


def runs(model: nn.Module, tensors: Mapping[str, Tensor], constants: Mapping[str, Any]) -> bool:
    """Return whether a model takes these inputs."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), unchanged_buffers(model):
        try:
            model(**tensors, **constants)
        except Exception:  # whatever a model raises at sizes that don't fit
            return False
    return True


@contextmanager
def forward_of_tensors(
    model: nn.Module, function: Callable[..., Any], inputs: Sequence[str]
) -> Iterator[None]:
    """Let a function of keyword tensors be the model's forward.

    It gets the signature that the graph will have: torch.export can't name what ``**kwargs`` takes.
    """
    kind = inspect.Parameter.KEYWORD_ONLY
    function.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in inputs])  # type: ignore[attr-defined]
    own = model.__dict__.get("forward")
    model.forward = function
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


@contextmanager
def constants_bound(model: nn.Module, inputs: list[str], constants: dict[str, Any]) -> Iterator[None]:
    """Let the model's forward take the inputs alone, with everything else that it takes bound to constants."""
    forward = model.forward

    def bound(**tensors: Tensor) -> Any:
        return without_caches(forward(**tensors, **constants))

    with forward_of_tensors(model, bound, inputs):
        yield


def without_caches(outputs: Any) -> Any:
    """Return a model's outputs as ``use_cache=False`` gives them, also where the model makes a cache all the same."""
    library = sys.modules.get("transformers.cache_utils")
    if library is None or not isinstance(outputs, Mapping):
        return outputs
    kept = {name: value for name, value in outputs.items() if not isinstance(value, library.Cache)}
    kind: Any = type(outputs)
    return outputs if len(kept) == len(outputs) else kind(**kept)
