"""Changes a model for a trace and puts it back as it was: its forward, its buffers, the cache that it returns."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ti_fx.errors import CaptureError
from ti_fx.passes.normalise.leaf_modules import AVERAGE


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
def unchanged_attributes(model: nn.Module) -> Iterator[None]:
    """Put back what modules keep beside their tensors, and their submodules.

    Some settle a window or the form of their attention by the sizes of a call, and keep it.
    """
    before = [(module, type(module), dict(vars(module)), _dictionaries(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, kind, attributes, dictionaries in before:
            if type(module) is kind:  # a lazy module has become another by its first call
                vars(module).clear()
                vars(module).update(attributes)
                for held, content in dictionaries:
                    held.clear()
                    held.update(content)


def _dictionaries(module: nn.Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """Return a module's dictionaries (submodules, hooks, ...), each with a copy."""
    return [(held, dict(held)) for held in vars(module).values() if isinstance(held, dict)]


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Put every buffer back as it was, values and all: running statistics change with every forward in training.

    So is what modules keep beside them.
    """
    before = [(value, value.detach().clone()) for value in model.buffers()]
    try:
        with unchanged_attributes(model):
            yield
    finally:
        with torch.no_grad():
            for value, copy in before:
                if value.grad_fn is not None:
                    value.detach_()
                value.copy_(copy)


def written_buffers(model: nn.Module, run: Callable[[], Any]) -> set[str]:
    """Return the names of the buffers that a run writes into or puts another tensor in the place of; it is undone."""
    with unchanged_buffers(model):
        before = {
            name: (value, value._version, value.detach().clone())
            for name, value in model.named_buffers(remove_duplicate=False)
        }
        run()
        after = dict(model.named_buffers(remove_duplicate=False))
        return {
            name
            for name, (value, version, copy) in before.items()
            # running statistics move without a version
            if after.get(name) is not value or value._version != version or not torch.equal(value, copy)
        }


def values_of_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every buffer, by name."""
    return {name: value.detach().clone() for name, value in model.named_buffers()}


def python_state(model: nn.Module) -> dict[tuple[int, str], Any]:
    """Return what modules keep beside their tensors and a call may change: numbers, by value, tensors, by identity."""
    return {
        (index, name): id(value) if isinstance(value, Tensor) else value
        for index, module in enumerate(model.modules())
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | Tensor)
    }


def has_moved(model: nn.Module, state: dict[tuple[int, str], Any]) -> bool:
    """Whether a call has changed what modules keep beside their tensors."""
    return python_state(model) != state


@contextmanager
def averages_said(model: nn.Module) -> Iterator[None]:
    """Let batch norms that weigh all batches alike (``momentum=None``) say so by a number that no other one has.

    Their own code reads the count of batches in Python, which a trace can't. ``ti_fx.passes.normalise`` knows the
    number.

    Raises:
        CaptureError: statistics are of all processes, which a graph's are not.
    """
    together = [name for name, part in model.named_modules() if isinstance(part, nn.SyncBatchNorm)]
    if together and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise CaptureError(
            f"{together[0]} is a SyncBatchNorm, whose statistics are of all processes, and a graph's are of one; "
            "make it a BatchNorm, or train in one process"
        )
    found = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.momentum is None]
    for part in found:
        part.momentum = AVERAGE
    try:
        yield
    finally:
        for part in found:
            part.momentum = None


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

    with forward_of_tensors(model, bound, inputs), averages_said(model):
        yield


def without_caches(outputs: Any) -> Any:
    """Return a model's outputs as ``use_cache=False`` gives them, also where the model makes a cache all the same."""
    library = sys.modules.get("transformers.cache_utils")
    if library is None or not isinstance(outputs, Mapping):
        return outputs
    kept = {name: value for name, value in outputs.items() if not isinstance(value, library.Cache)}
    kind: Any = type(outputs)
    return outputs if len(kept) == len(outputs) else kind(**kept)
