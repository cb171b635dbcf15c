"""Training stops in one line when a loss or a gradient is no number, instead of going on with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from ti_fx.errors import TrainingError
from ti_fx.train.model import TernaryModel
from ti_fx.train.source import not_finite

_WAYS = "lower the learning rate, or look at the rows of this step"


def refuse_loss(loss: Tensor, model: TernaryModel, inputs: Mapping[str, Any], step: int) -> NoReturn:
    """Say where a loss that is not finite comes from.

    Args:
        loss: of a step, [].
        model: what was trained.
        inputs: the step's rows.
        step: counted from 1.

    Raises:
        TrainingError: names the step, the phase, and the first input, weight or loss term that is not finite.
    """
    found = f"step {step}, phase {model.phase.name!r}: the loss is {_number(loss)}"
    for name, value in inputs.items():
        if isinstance(value, Tensor) and not_finite(value) == "nan":
            raise TrainingError(f"{found}, as input {name} holds nan; {_WAYS}")
    for name, value in model.named_parameters():
        if (what := not_finite(value)) is not None:
            raise TrainingError(f"{found}, as weight {name} holds {what}; {_WAYS}")
    with torch.no_grad():
        losses = model(**{name: inputs[name] for name in model.inputs})["losses"]
    terms = [name for name, value in losses.items() if not bool(value.isfinite())]
    raise TrainingError(f"{found}, from the term {terms[0] if terms else 'task'}; {_WAYS}")


def refuse_gradient(norm: Any, model: TernaryModel, step: int) -> None:
    """Refuse to move the weights by gradients that are not finite.

    Args:
        norm: of all gradients.
        model: what is trained.
        step: counted from 1.

    Raises:
        TrainingError: names the step, the phase and the first such Parameter.
    """
    if math.isfinite(float(norm)):
        return
    for name, value in model.named_parameters():
        if value.grad is not None and (what := not_finite(value.grad)) is not None:
            raise TrainingError(
                f"step {step}, phase {model.phase.name!r}: the gradient of {name} holds {what}; {_WAYS}"
            )


def _number(value: Tensor) -> str:
    return "nan" if bool(value.isnan()) else "infinite"
