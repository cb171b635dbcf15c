"""A student is compared with the original model in ONNX Runtime, in fp32 and with its own dynamic int8."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from ti_fx.errors import ExportError, first_line
from ti_fx.export.cached.causal import PAST_AXES, causal_inputs
from ti_fx.files import atomic_path
from ti_fx.frontend.model_for_trace import forward_of_tensors
from ti_fx.ir.edit import mode


def export_fp32(
    model: nn.Module,
    path: Path,
    example: Mapping[str, Tensor],
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | None = None,
) -> None:
    """Write a model as its users would: torch.onnx, scaled-dot-product attention where it has any, dynamic sizes.

    Args:
        model: the original model; its own forward is exported.
        path: the ``.onnx`` file.
        example: keyword inputs, every size at least 2.
        dynamic_shapes: as of torch.onnx; None lets torch find out which sizes may change.

    Raises:
        ExportError: torch.onnx can't export it.
    """
    shapes = dict(dynamic_shapes or {}) or {
        name: dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO) for name, value in example.items()
    }
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with mode(model, False), atomic_path(path) as temporary, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch.onnx warns about its own internals
            program = torch.onnx.export(
                model,
                (),
                kwargs=dict(example),
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
                optimize=True,
            )
            assert program is not None
            program.save(str(temporary), external_data=False)
    except Exception as error:  # torch.onnx wraps whatever went wrong in errors of several modules
        reason = first_line(error.__cause__ or error)
        raise ExportError(
            f"torch.onnx can't export {type(model).__name__} in fp32: {reason}; compare with a file of your own"
        ) from error
    finally:
        logger.setLevel(level)


def export_fp32_with_cache(model: nn.Module, path: Path, example: Mapping[str, Any]) -> None:
    """Write a causal language model with the inputs and outputs of :func:`ti_fx.export.with_cache`.

    Raises:
        InputError: it has no cache of keys and values. ExportError: torch.onnx can't export it.
    """
    with mode(model, False):
        inputs, forward = causal_inputs(model, example)
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {
        name: dict.fromkeys(PAST_AXES if name.startswith("past_") else (0, 1), dynamic) for name in inputs
    }
    with forward_of_tensors(model, forward, list(inputs)):
        export_fp32(model, path, inputs, shapes)


def export_dynamic_int8(fp32: Path, path: Path, operators: Sequence[str] | None = None) -> None:
    """Write ONNX Runtime's own dynamic int8 quantisation of an fp32 file.

    Args:
        fp32: the file.
        path: the new one.
        operators: what is quantised, such as ``MatMul``; None: everything that ONNX Runtime can, embeddings too.
    """
    model = onnx.load(fp32)
    # torch's shapes of intermediate values stop quantize_dynamic's shape inference
    del model.graph.value_info[:]
    with atomic_path(path) as temporary:
        logger = logging.getLogger()
        level = logger.level
        logger.setLevel(logging.ERROR)  # it advises a pre-processing that fails on torch's exports
        try:
            quantize_dynamic(model, temporary, operators, weight_type=QuantType.QInt8)
        finally:
            logger.setLevel(level)
