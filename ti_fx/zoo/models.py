"""``build`` makes a tiny model with random weights by its type's name, and two examples of its inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ti_fx.errors import DataError, did_you_mean
from ti_fx.example_inputs.make import example_inputs
from ti_fx.example_inputs.request import Sizes
from ti_fx.zoo.redraw import redraw
from ti_fx.zoo.settings import REFUSED, TASKS
from ti_fx.zoo.tiny import tiny_config

# What a user trains, by the words of transformers' tables of classes. The first table with the type decides.
_ENCODER_DECODER = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
_GENERATES = ("IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "MULTIMODAL_LM")
_OTHERS = (
    "SEQUENCE_CLASSIFICATION",
    "MASKED_LM",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "OBJECT_DETECTION",
    "DEPTH_ESTIMATION",
    "UNIVERSAL_SEGMENTATION",
    "TEXT_RECOGNITION",
)
EXAMPLE = Sizes(batch=2, length=12)
OTHER = Sizes(batch=3, length=16)


@dataclass(frozen=True)
class Entry:
    """A tiny model with inputs.

    Attributes:
        name: the model type.
        model: in eval mode, float32, weights drawn by ``ti_fx.zoo.redraw``.
        example: the forward's keywords, with a batch of two.
        other: the same keywords with a batch of three and, where there is a text, another length.
        attention: the implementation that the model was built with, ``eager`` or ``sdpa``.
        model_class: the class's name.
    """

    name: str
    model: nn.Module
    example: dict[str, Tensor]
    other: dict[str, Tensor]
    attention: str
    model_class: str


def model_types() -> list[str]:
    """Return every model type that the installed transformers build through an auto class, sorted."""
    return sorted(modeling_auto.MODEL_MAPPING_NAMES)


def build(model_type: str, attention: str = "eager", seed: int = 0) -> Entry:
    """Return a tiny model of that type, the same for the same seed.

    Args:
        model_type: one of ``model_types()``.
        attention: ``eager`` or ``sdpa``.
        seed: of the weights and the inputs.

    Raises:
        DataError: the type is unknown, is refused in ``settings.REFUSED``, has no such attention, or can't be
            built or run; the message is one line that names what was missing.
    """
    if model_type not in modeling_auto.MODEL_MAPPING_NAMES:
        raise DataError(f"unknown model type {model_type!r}{did_you_mean(model_type, model_types())}")
    if model_type in REFUSED:
        raise DataError(f"{model_type}: {REFUSED[model_type]}")
    config_class = CONFIG_MAPPING[model_type]
    try:
        config = tiny_config(config_class())
    except Exception as error:
        raise DataError(f"{model_type}: no tiny configuration: {_line(error)}") from error
    return build_from(model_type, config, attention, seed)


def build_from(name: str, config: PreTrainedConfig, attention: str = "eager", seed: int = 0) -> Entry:
    """Return the entry for a configuration that is tiny already: see ``build``."""
    try:
        chosen = model_class(name, config)
    except ValueError as error:
        raise DataError(f"{name}: transformers names a class that it doesn't have: {_line(error)}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = chosen._from_config(  # type: ignore[no-untyped-call]
                config, attn_implementation=attention, dtype=torch.float32
            )
        except ImportError as error:
            package = re.search(r"requires the (\S+) library", str(error))
            wanted = package.group(1) if package else str(error.name)
            raise DataError(
                f"{name}: needs the package {wanted}; install it, or leave this type out"
            ) from error
        except Exception as error:
            if "does not support an attention implementation" in str(error):
                raise DataError(
                    f"{name}: a class of its model has no {attention} attention; use eager"
                ) from error
            raise DataError(
                f"{name}: {chosen.__name__} can't be built with {attention}: {_line(error)}"
            ) from error
    model.eval()
    redraw(model, seed)
    example, other = example_inputs(name, model, (EXAMPLE, OTHER), seed)
    return Entry(
        name=name,
        model=model,
        example=example,
        other=other,
        attention=attention,
        model_class=chosen.__name__,
    )


def model_class(name: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that a user trains for this type of model."""
    encoder_decoder = config.is_encoder_decoder
    in_both = all(name in _table(task) for task in ("MASKED_LM", "SEQUENCE_CLASSIFICATION"))
    order = (
        *((TASKS[name],) if name in TASKS else ()),
        *(_ENCODER_DECODER if encoder_decoder else ()),
        *(("SEQUENCE_CLASSIFICATION",) if in_both else ()),
        *_GENERATES,
        *_OTHERS,
    )
    for task in order:
        if task == "BASE":
            break
        if name in _table(task):
            return _class_of(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING")[type(config)])
    return _class_of(modeling_auto.MODEL_MAPPING[type(config)])


def _class_of(found: Any) -> type[PreTrainedModel]:
    chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    return chosen


def _table(task: str) -> Mapping[str, Any]:
    return getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def entry_of(name: str, made: object) -> Entry:
    """Return the entry of what a factory made: ``(model, example)`` or ``(model, example, other)``.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise DataError(
            f"{name}() must return (model, example) or (model, example, other), got {type(made).__name__}"
        )
    model, example, *others = made
    return Entry(
        name, model.eval(), dict(example), dict(others[0] if others else example), "", type(model).__name__
    )
