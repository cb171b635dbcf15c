"""Tiny heads of transformers with labels for them: what a forward takes for each task."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ti_fx.example_inputs.make import example_inputs
from ti_fx.example_inputs.request import Sizes
from ti_fx.zoo.redraw import redraw
from ti_fx.zoo.settings import REFUSED
from ti_fx.zoo.tiny import tiny_config

ROWS, LENGTH = 3, 12
TASKS = (
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE",
    "NEXT_SENTENCE_PREDICTION", "MASKED_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "PRETRAINING",
    "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION", "AUDIO_FRAME_CLASSIFICATION",
    "AUDIO_XVECTOR", "CTC", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "MASKED_IMAGE_MODELING",
    "IMAGE_TEXT_TO_TEXT", "TABLE_QUESTION_ANSWERING", "VISUAL_QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING",
)  # fmt: skip


def all_heads() -> Iterator[tuple[str, str, str]]:
    """Yield each task, model type and class name of transformers' tables."""
    for task in TASKS:
        for model_type, name in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}).items():
            for one in (name,) if isinstance(name, str) else name:
                if model_type not in REFUSED and model_type in modeling_auto.MODEL_MAPPING_NAMES:
                    yield task, model_type, one


def head(
    task: str, model_type: str, name: str, **fields: Any
) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """Return a tiny model in evaluation, its inputs and its labels, by the names that its forward has for them."""
    import transformers

    config = tiny_config(CONFIG_MAPPING[model_type]())
    if not task.endswith("QUESTION_ANSWERING"):
        config.num_labels = 3
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    if getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0
    for field, value in fields.items():
        setattr(config, field, value)
    kind: Any = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    redraw(model, 0)
    (inputs,) = example_inputs(model_type, model, (Sizes(ROWS, LENGTH),), 0)
    if task == "MULTIPLE_CHOICE":
        inputs = {key: torch.stack([value, value.roll(1, 0)], 1) for key, value in inputs.items()}
    with torch.no_grad():
        outputs = model(**inputs, **without_caches(model))
    return model, inputs, labels_for(task, model, inputs, outputs)


def without_caches(model: nn.Module) -> dict[str, bool]:
    parameters = inspect.signature(model.forward).parameters
    return {one: False for one in ("use_cache", "use_mems") if one in parameters}


def labels_for(task: str, model: Any, inputs: dict[str, Tensor], outputs: Any) -> dict[str, Tensor]:
    """Return random labels, some of them ignored, for what the outputs look like."""
    generator = torch.Generator().manual_seed(5)

    def ids(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    logits = outputs.get("logits")
    rows = len(next(iter(inputs.values())))
    parameters = inspect.signature(model.forward).parameters
    if "start_positions" in parameters:
        return {"start_positions": ids(6, rows), "end_positions": ids(6, rows) + 4}
    if task in ("NEXT_SENTENCE_PREDICTION", "MULTIPLE_CHOICE"):
        return {"labels": ids(2, rows)}
    if task == "PRETRAINING" and "next_sentence_label" in parameters:
        words = _ignored(ids(100, *outputs.prediction_logits.shape[:2]))
        return {"labels": words, "next_sentence_label": ids(2, rows)}
    if task in ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION",
                "AUDIO_XVECTOR"):  # fmt: skip
        return {"labels": ids(3, rows)}
    if task == "AUDIO_FRAME_CLASSIFICATION":
        return {"labels": torch.nn.functional.one_hot(ids(3, *logits.shape[:2]), 3)}
    if task == "CTC":
        return {"labels": ids(20, rows, 2) + 1}
    if task == "SEMANTIC_SEGMENTATION":
        return {"labels": ids(3, rows, *inputs["pixel_values"].shape[-2:])}
    if task == "DEPTH_ESTIMATION":
        return {"labels": torch.rand(outputs.predicted_depth.shape, generator=generator)}
    if task == "VISUAL_QUESTION_ANSWERING":
        return {"labels": torch.rand(logits.shape, generator=generator)}
    if task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT"):
        return {"labels": _ignored(inputs["input_ids"].clone())}
    if task in ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"):
        return {"labels": _ignored(ids(100, *inputs["decoder_input_ids"].shape))}
    if task == "TOKEN_CLASSIFICATION":
        return {"labels": _ignored(ids(3, *logits.shape[:2]))}
    shown = logits if logits is not None else outputs[0]
    return {"labels": _ignored(ids(int(shown.shape[-1]), *shown.shape[:2]))}


def _ignored(labels: Tensor) -> Tensor:
    """Let the last label of the second row be one that no loss counts."""
    labels[1, -1] = -100
    return labels
