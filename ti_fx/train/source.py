"""A model is checked, and made ready, before a student is made of it: types, values, and what may be trained."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ti_fx.errors import InputError
from ti_fx.frontend.wrappers import plain_model, unwrapped

logger = logging.getLogger(__name__)


def ready_source(model: nn.Module) -> nn.Module:
    """Return the model to make a student of: without wrappers, in float32, every weight a number.

    A model in half precision becomes float32 in place, which a warning says.

    Raises:
        InputError: no model, one with adapters, a graph that was captured in half precision, or a weight that is not
            finite; names the tensor.
    """
    if isinstance(model, type) or not isinstance(model, nn.Module):
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        raise InputError(f"TernaryTrainer needs a model, an nn.Module, and got {kind}; pass the model itself")
    model = plain_model(model)
    if hasattr(model, "merge_and_unload"):
        raise InputError(
            f"{type(model).__name__} trains adapters beside a frozen base, which a ternary student has not; pass "
            "model.merge_and_unload().requires_grad_(True)"
        )
    _to_float32(model)
    with unwrapped(model):
        refuse_not_finite(model)
    return model


def refuse_not_finite(model: nn.Module) -> None:
    """Refuse a model with a Parameter that is not finite, or a buffer with NaN (one may hold a mask's infinities).

    Raises:
        InputError: names the tensor.
    """
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        found = not_finite(value)
        if found is not None and (found == "nan" or isinstance(value, nn.Parameter)):
            raise InputError(
                f"{name} of {type(model).__name__} holds {found}, so nothing can be trained from it; load the model "
                "again, or take an earlier checkpoint of it"
            )


def not_finite(value: Tensor) -> str | None:
    """Return ``nan`` or ``infinity`` if a tensor holds one, else None."""
    if not (value.is_floating_point() or value.is_complex()) or value.is_meta or bool(value.isfinite().all()):
        return None
    return "nan" if bool(value.isnan().any()) else "infinity"


def _to_float32(model: nn.Module) -> None:
    half = {
        str(value.dtype).removeprefix("torch.")
        for value in model.parameters()
        if value.is_floating_point() and value.element_size() < 4
    }
    if not half:
        return
    types = " and ".join(sorted(half))
    if isinstance(model, GraphModule):
        raise InputError(
            f"the graph was captured from a model in {types}, and a student is trained and exported in float32; "
            "capture model.float()"
        )
    logger.warning(
        f"{type(model).__name__} was in {types} and is float32 now, in which a student is trained and exported; "
        "TrainingArguments(bf16=True) computes in bfloat16 all the same"
    )
    model.float()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "dtype"):
        config.dtype = torch.float32
