"""Passes rewrite a graph: each has a file, in four folders in the order of the pipeline."""

if __name__ != "ti_fx.passes":
    raise ImportError(f"import ti_fx.passes, not {__name__}: this would make a second copy of every pass")

from ti_fx.passes.deploy.pack import Pack
from ti_fx.passes.deploy.requantize import Requantize
from ti_fx.passes.deploy.strip import Strip
from ti_fx.passes.normalise.canonicalize import Canonicalize
from ti_fx.passes.prepare.calibrate import Calibrate
from ti_fx.passes.prepare.decompose_attention import DecomposeAttention
from ti_fx.passes.prepare.distill import Distill
from ti_fx.passes.prepare.duplicate_teacher import DuplicateTeacher
from ti_fx.passes.prepare.intervene import Intervene
from ti_fx.passes.prepare.keep_layers import KeepLayers
from ti_fx.passes.prepare.phase_in import PhaseIn
from ti_fx.passes.prepare.quantize_activations import QuantizeActivations
from ti_fx.passes.prepare.sub_norms import SubNorms
from ti_fx.passes.prepare.ternarize import Ternarize
from ti_fx.passes.prepare.weigh_losses import WeighLosses

__all__ = [
    "Calibrate",
    "Canonicalize",
    "DecomposeAttention",
    "Distill",
    "DuplicateTeacher",
    "Intervene",
    "KeepLayers",
    "Pack",
    "PhaseIn",
    "QuantizeActivations",
    "Requantize",
    "Strip",
    "SubNorms",
    "Ternarize",
    "WeighLosses",
]
