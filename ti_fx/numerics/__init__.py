"""The numbers of quantisation and of distillation, as plain functions on tensors; no graph code here.

``ternary`` and ``int8_tensor`` and their kin are what the graph's quantiser nodes call.
"""

from ti_fx.numerics.activations import (
    detach,
    int8_block_32,
    int8_block_64,
    int8_block_128,
    int8_reference,
    int8_tensor,
    int8_token,
)
from ti_fx.numerics.codes import pack_codes, unpack_codes, unpack_ternary
from ti_fx.numerics.ternary_weights import CLIP, Granularity, ternary, ternary_codes, ternary_embedding

__all__ = [
    "CLIP",
    "Granularity",
    "detach",
    "int8_block_32",
    "int8_block_64",
    "int8_block_128",
    "int8_reference",
    "int8_tensor",
    "int8_token",
    "pack_codes",
    "ternary",
    "ternary_codes",
    "ternary_embedding",
    "unpack_codes",
    "unpack_ternary",
]
