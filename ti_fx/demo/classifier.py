"""The demo exports the original classifier to fp32 ONNX, to compare the students with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ti_fx.measure import baselines


def export_fp32(model_folder: Path, path: Path, example: Mapping[str, Tensor]) -> None:
    """Write the original model as its users would: torch.onnx, scaled-dot-product attention, dynamic sizes.

    Args:
        model_folder: a saved sequence classification model.
        path: the ``.onnx`` file.
        example: ``(batch, sequence)`` inputs of at least 2 by 2.
    """
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        model_folder, attn_implementation="sdpa"
    ).eval()
    batch, sequence = (
        torch.export.Dim("batch"),
        torch.export.Dim("sequence", max=model.config.max_position_embeddings),
    )
    baselines.export_fp32(model, path, example, {name: {0: batch, 1: sequence} for name in example})
