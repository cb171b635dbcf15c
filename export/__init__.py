"""The back end turns a packed graph into an ONNX file that computes in ONNX Runtime what PyTorch does."""

if __name__ != "ti_fx.export":
    raise ImportError(f"import ti_fx.export, not {__name__}: this would make a second copy of its classes")

from ti_fx.export.cached.causal import with_cache
from ti_fx.export.cached.encoder_decoder import encoder_decoder_with_cache
from ti_fx.export.compare import check
from ti_fx.export.lowered import lower
from ti_fx.export.pack_from import pack_from
from ti_fx.export.report import ExportReport, ParityReport
from ti_fx.export.run.genai import write_genai_config
from ti_fx.export.run.pipeline import pipeline
from ti_fx.export.run.session import Runtime, session
from ti_fx.export.writer import to_onnx

__all__ = [
    "ExportReport",
    "ParityReport",
    "Runtime",
    "check",
    "encoder_decoder_with_cache",
    "lower",
    "pack_from",
    "pipeline",
    "session",
    "to_onnx",
    "with_cache",
    "write_genai_config",
]
