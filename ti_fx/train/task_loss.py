"""The model's own loss on labels, which a recipe may weigh beside distillation and evaluation reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ti_fx.errors import DataError

TaskLoss = Callable[[Any, dict[str, Tensor]], Tensor]


def task_loss(source: nn.Module, given: Callable[..., Tensor] | None) -> TaskLoss | None:
    """Return the loss of outputs and labels, None where there is none that can be called on those.

    Args:
        source: the model; one of transformers has a loss function of its own.
        given: the ``compute_loss_func`` that Trainer was given, which goes first.

    The loss raises DataError where the labels are beyond the model's outputs.
    """
    if given is None and not (hasattr(source, "loss_function") and hasattr(source, "config")):
        return None

    def loss(outputs: Any, labels: dict[str, Tensor]) -> Tensor:
        try:
            if given is not None:
                return given(outputs, single(tuple(labels.values())), num_items_in_batch=None)
            return _source_loss(source, outputs, labels)
        except IndexError as error:  # torch's "Target 7 is out of bounds."
            names = ", ".join(labels)
            raise DataError(
                f"the model's loss can't take the labels in {names}: {error}; make them fit the model's outputs"
            ) from error

    return loss


def _source_loss(source: Any, outputs: Any, labels: dict[str, Tensor]) -> Tensor:
    """Call a Hugging Face model's own loss function; each of them takes what it needs by name."""
    known = {"pooled_logits": outputs.get("logits"), **outputs, **labels}
    vocabulary = getattr(source.config, "vocab_size", None)
    loss: Tensor = source.loss_function(config=source.config, vocab_size=vocabulary, **known)
    return loss


def leaves(outputs: Any) -> dict[str, Tensor]:
    """Return an output structure's tensors by name."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    items = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    found: dict[str, Tensor] = {}
    for name, value in items:
        if isinstance(value, Tensor):
            found[str(name)] = value
        elif value is not None:
            found.update({f"{name}.{inner}": leaf for inner, leaf in leaves(value).items()})
    return found


def single(values: tuple[Any, ...]) -> Any:
    """Return a lone value as it is, several as a tuple: so Trainer and its metrics take them."""
    return values[0] if len(values) == 1 else values
