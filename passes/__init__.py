"""The passes: one rewrite of the graph a file, the file named after the pass."""

if __name__ != "ti_fx.passes":
    raise ImportError(f"import ti_fx.passes, not {__name__}: this would make a second copy of every pass")

from ti_fx.passes.canonicalize import Canonicalize
from ti_fx.passes.decompose_attention import DecomposeAttention
from ti_fx.passes.distill import Distill
from ti_fx.passes.duplicate_teacher import DuplicateTeacher
from ti_fx.passes.intervene import Intervene
from ti_fx.passes.pack import Pack
from ti_fx.passes.quantize_activations import QuantizeActivations
from ti_fx.passes.strip import Strip
from ti_fx.passes.ternarize import Ternarize

__all__ = [
    "Canonicalize",
    "DecomposeAttention",
    "Distill",
    "DuplicateTeacher",
    "Intervene",
    "Pack",
    "QuantizeActivations",
    "Strip",
    "Ternarize",
]
