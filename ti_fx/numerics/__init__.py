"""The numbers of quantisation and of distillation, as plain functions on tensors; no graph code here.

``ternary`` and ``int8_tensor`` and their kin are what the graph's quantiser nodes call. Each is imported when it is
first used, so that the names of encodings can be read without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ti_fx.numerics.blends import blend, detach_by, phase_in, route
    from ti_fx.numerics.codes import pack_codes, unpack_codes, unpack_ternary
    from ti_fx.numerics.gradients import detach
    from ti_fx.numerics.look_ups import quantised_embedding
    from ti_fx.numerics.quantisers.int8_block import int8_block_32, int8_block_64, int8_block_128
    from ti_fx.numerics.quantisers.int8_reference import int8_reference
    from ti_fx.numerics.quantisers.int8_tensor import int8_tensor
    from ti_fx.numerics.quantisers.int8_token import int8_token
    from ti_fx.numerics.ternary_weights import ternary, ternary_codes, ternary_embedding
    from ti_fx.numerics.weight_codes import CLIP, Granularity

__all__ = [
    "CLIP",
    "Granularity",
    "blend",
    "detach",
    "detach_by",
    "int8_block_32",
    "int8_block_64",
    "int8_block_128",
    "int8_reference",
    "int8_tensor",
    "int8_token",
    "pack_codes",
    "phase_in",
    "quantised_embedding",
    "route",
    "ternary",
    "ternary_codes",
    "ternary_embedding",
    "unpack_codes",
    "unpack_ternary",
]

# Where each name is defined.
_HOMES = {
    "CLIP": "weight_codes",
    "Granularity": "weight_codes",
    "blend": "blends",
    "detach": "gradients",
    "detach_by": "blends",
    "int8_block_32": "quantisers.int8_block",
    "int8_block_64": "quantisers.int8_block",
    "int8_block_128": "quantisers.int8_block",
    "int8_reference": "quantisers.int8_reference",
    "int8_tensor": "quantisers.int8_tensor",
    "int8_token": "quantisers.int8_token",
    "pack_codes": "codes",
    "phase_in": "blends",
    "quantised_embedding": "look_ups",
    "route": "blends",
    "ternary": "ternary_weights",
    "ternary_codes": "ternary_weights",
    "ternary_embedding": "ternary_weights",
    "unpack_codes": "codes",
    "unpack_ternary": "codes",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f"ti_fx.numerics.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ti_fx.numerics' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the names, too, that are imported when first used."""
    return sorted({*globals(), *__all__})
