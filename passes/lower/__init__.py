"""A packed graph becomes a lowered one, which says what the ONNX file computes; LOWER is how, a pass a line."""

from ti_fx.ir.pipeline import Pipeline
from ti_fx.ir.stages import LOWERED
from ti_fx.passes.lower.choose_layouts import ChooseLayouts
from ti_fx.passes.lower.dequantise_weights import DequantiseWeights
from ti_fx.passes.lower.drop_dropout import DropDropout
from ti_fx.passes.lower.drop_identities import DropIdentities
from ti_fx.passes.lower.drop_squeezes import DropSqueezes
from ti_fx.passes.lower.forget_roles import ForgetRoles
from ti_fx.passes.lower.fuse_attention import FuseAttention
from ti_fx.passes.lower.fuse_rms_norms import FuseRmsNorms
from ti_fx.passes.lower.fuse_rotary import FuseRotary
from ti_fx.passes.lower.keep_sums_apart import KeepSumsApart
from ti_fx.passes.lower.look_up_packed import LookUpPacked
from ti_fx.passes.lower.mark_halves import MarkHalves
from ti_fx.passes.lower.multiply_blocks import MultiplyBlocks
from ti_fx.passes.lower.multiply_integers import MultiplyIntegers
from ti_fx.passes.lower.require_ids import RequireIds
from ti_fx.passes.lower.round_activations import RoundActivations
from ti_fx.passes.lower.split_complex import SplitComplex
from ti_fx.passes.lower.write_core_operators import WriteCoreOperators
from ti_fx.passes.lower.write_fixed_sizes import WriteFixedSizes
from ti_fx.passes.lower.write_for_exporter import WriteForExporter

LOWER = Pipeline(
    DropDropout(),
    DropSqueezes(),
    WriteFixedSizes(),
    SplitComplex(),
    ChooseLayouts(),
    RequireIds(),
    LookUpPacked(),
    MultiplyBlocks(),
    MultiplyIntegers(),
    RoundActivations(),
    DequantiseWeights(),
    MarkHalves(),
    DropIdentities(),
    FuseRmsNorms(),
    FuseRotary(),
    FuseAttention(),
    KeepSumsApart(),
    WriteForExporter(),
    WriteCoreOperators(),
    ForgetRoles(),
    stage=LOWERED,
)

__all__ = [
    "LOWER",
    "ChooseLayouts",
    "DequantiseWeights",
    "DropDropout",
    "DropIdentities",
    "DropSqueezes",
    "ForgetRoles",
    "FuseAttention",
    "FuseRmsNorms",
    "FuseRotary",
    "KeepSumsApart",
    "LookUpPacked",
    "MarkHalves",
    "MultiplyBlocks",
    "MultiplyIntegers",
    "RequireIds",
    "RoundActivations",
    "SplitComplex",
    "WriteCoreOperators",
    "WriteFixedSizes",
    "WriteForExporter",
]
