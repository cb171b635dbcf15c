"""Finds the model that another library has wrapped (torch.compile, DDP, accelerate), whose names its tensors keep."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ti_fx.errors import InputError

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def plain_model(model: nn.Module) -> nn.Module:
    """Return the model within ``torch.compile``, ``DistributedDataParallel``, ``DataParallel`` and ``AveragedModel``.

    Raises:
        InputError: its parameters are sharded (FSDP).
    """
    while (inner := _within(model)) is not None:
        model = inner
    return model


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Take the wrappers off a plain model's submodules, so that each tensor has its source's name, and put them back.

    Within, nothing that was compiled runs compiled, and what accelerate put around a forward (autocast) is off.

    Raises:
        InputError: the parameters of a submodule are sharded (FSDP).
    """
    children = [
        (module, name, child)
        for module in model.modules()
        for name, child in module._modules.items()
        if child is not None and _within(child) is not None
    ]
    for module, name, child in children:
        module._modules[name] = plain_model(child)
    own = [
        (module, name, module.__dict__[name])
        for module in model.modules()
        for name in ("forward", "_compiled_call_impl")
        if name in module.__dict__ and (name != "forward" or "_original_forward" in module.__dict__)
    ]
    for module, name, _ in own:
        module.__dict__[name] = module.__dict__["_original_forward"] if name == "forward" else None
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, name, value in own:
            module.__dict__[name] = value
        for module, name, child in children:
            module._modules[name] = child


def _within(model: nn.Module) -> nn.Module | None:
    """Return the model that this one wraps, None if it wraps none."""
    if isinstance(model, FullyShardedDataParallel | FSDPModule):
        raise InputError(
            f"the parameters of {type(model).__name__} are sharded over processes; pass the model as it was before, "
            "and let TrainingArguments(fsdp=...) shard the student"
        )
    inner: Any = None
    if isinstance(model, OptimizedModule):
        inner = model._orig_mod
    elif isinstance(model, DistributedDataParallel | DataParallel | AveragedModel):
        inner = model.module
    return inner if isinstance(inner, nn.Module) else None


def input_names(model: nn.Module) -> list[str] | None:
    """Return the names that a model's forward takes; None where it takes any, and what it passes them to is not known.

    A ``forward(*args, **kwargs)`` takes what the model within takes: ``get_base_model()``, or its only submodule.
    """
    while True:
        parameters = inspect.signature(model.forward).parameters
        named = [name for name, one in parameters.items() if one.kind not in _VARIADIC]
        if named or not parameters:
            return named
        base = getattr(model, "get_base_model", None)
        inner = [base()] if callable(base) else list(model.children())
        if len(inner) != 1:
            return None
        model = plain_model(inner[0])
