"""What the students are compared with: ONNX Runtime on the original model, in fp32 and with its own dynamic int8."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ti_fx.files import atomic_path


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
    shapes = {name: {0: batch, 1: sequence} for name in example}
    with atomic_path(path) as temporary, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.onnx warns about its own internals
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            model, (), kwargs=dict(example), dynamic_shapes=shapes, dynamo=True, verbose=False, optimize=True
        )
        assert program is not None
        program.save(str(temporary), external_data=False)


def export_dynamic_int8(fp32: Path, path: Path, operators: Sequence[str] | None = None) -> None:
    """Write ONNX Runtime's own dynamic int8 quantisation of an fp32 file.

    Args:
        fp32: the file.
        path: the new one.
        operators: what is quantised, such as ``MatMul``; None: everything that ONNX Runtime can, embeddings too.
    """
    model = onnx.load(fp32)
    del model.graph.value_info[
        :
    ]  # torch's shapes of intermediate values stop quantize_dynamic's shape inference
    with atomic_path(path) as temporary:
        logger = logging.getLogger()
        level = logger.level
        logger.setLevel(logging.ERROR)  # it advises a pre-processing that fails on torch's exports
        try:
            quantize_dynamic(model, temporary, operators, weight_type=QuantType.QInt8)
        finally:
            logger.setLevel(level)
