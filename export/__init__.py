"""The back end: a packed graph becomes an ONNX file, checked to run in ONNX Runtime as it does in PyTorch."""

if __name__ != "ti_fx.export":
    raise ImportError(f"import ti_fx.export, not {__name__}: this would make a second copy of its classes")

from ti_fx.export.cache import with_cache
from ti_fx.export.choose import Choice, choose_encoding
from ti_fx.export.encoder_decoder import encoder_decoder_with_cache
from ti_fx.export.genai import write_genai_config
from ti_fx.export.parity import check
from ti_fx.export.pipelines import pipeline
from ti_fx.export.report import ExportReport, ParityReport
from ti_fx.export.runtime import Runtime, session
from ti_fx.export.weights import pack_from
from ti_fx.export.writer import to_onnx

__all__ = [
    "Choice",
    "ExportReport",
    "ParityReport",
    "Runtime",
    "check",
    "choose_encoding",
    "encoder_decoder_with_cache",
    "pack_from",
    "pipeline",
    "session",
    "to_onnx",
    "with_cache",
    "write_genai_config",
]
