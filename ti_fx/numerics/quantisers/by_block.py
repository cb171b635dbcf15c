"""One range per 32 neighbours of a token, whose product the file computes in floats.

ONNX Runtime multiplies integers with one scale per block in MatMulNBits alone, whose activations are symmetric and of
eight bits: that is ``int8_block_32``. MatMulInteger sums over all blocks before a scale could be applied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ti_fx.numerics.gradients import straight_through
from ti_fx.numerics.onnx_nodes import since_opset
from ti_fx.numerics.quantiser import Quantiser, asymmetric_step_of_token, step_of_token
from ti_fx.numerics.uniform import asymmetric, symmetric

BLOCK = 32


def int4_block_32(value: Tensor) -> Tensor:
    """Symmetric, codes -7..7, one scale per 32 neighbours of a token; straight-through gradient, nowhere zero."""
    return straight_through(value, partial(fake_quant_symmetric_blocks, bits=4))


def int2_block_32(value: Tensor) -> Tensor:
    """Symmetric, codes -1..1, one scale per 32 neighbours of a token; straight-through gradient, nowhere zero."""
    return straight_through(value, partial(fake_quant_symmetric_blocks, bits=2))


def int8_block_32_asymmetric(value: Tensor) -> Tensor:
    """Asymmetric, codes 0..255, one range per 32 neighbours of a token; straight-through gradient, nowhere zero."""
    return straight_through(value, partial(fake_quant_asymmetric_blocks, bits=8))


def int4_block_32_asymmetric(value: Tensor) -> Tensor:
    """Asymmetric, codes 0..15, one range per 32 neighbours of a token; straight-through gradient, nowhere zero."""
    return straight_through(value, partial(fake_quant_asymmetric_blocks, bits=4))


def int2_block_32_asymmetric(value: Tensor) -> Tensor:
    """Asymmetric, codes 0..3, one range per 32 neighbours of a token; straight-through gradient, nowhere zero."""
    return straight_through(value, partial(fake_quant_asymmetric_blocks, bits=2))


@since_opset(18)
def fake_quant_symmetric_blocks(value: Tensor, bits: int) -> Tensor:
    """Return the fake-quantised value, in training and in ONNX; the last block may be shorter, its length dynamic."""
    parts = _parts(value)
    return _joined(symmetric(parts, parts.abs().amax(dim=-1, keepdim=True), bits), value)


@since_opset(18)
def fake_quant_asymmetric_blocks(value: Tensor, bits: int) -> Tensor:
    """Return the fake-quantised value, in training and in ONNX; the last block may be shorter, its length dynamic."""
    parts = _parts(value)
    low, high = parts.amin(dim=-1, keepdim=True), parts.amax(dim=-1, keepdim=True)
    return _joined(asymmetric(parts, low, high, bits), value)


def _parts(value: Tensor) -> Tensor:
    """Return ``(..., blocks, 32)``; zeros, which every range holds, fill the last block."""
    length = value.shape[-1]
    blocks = (length + BLOCK - 1) // BLOCK  # of positive numbers: ONNX divides negative ones in another way
    padded = torch.nn.functional.pad(value, (0, blocks * BLOCK - length))
    return padded.reshape([*value.shape[:-1], blocks, BLOCK])


def _joined(parts: Tensor, value: Tensor) -> Tensor:
    length = value.shape[-1]
    blocks = (length + BLOCK - 1) // BLOCK
    return parts.reshape([*value.shape[:-1], blocks * BLOCK])[..., :length]


def _by_blocks(
    function: Callable[[Tensor], Tensor], bits: int, step: Callable[..., Tensor], value: Callable[..., Tensor]
) -> Quantiser:
    return Quantiser(
        function,
        batch_invariant=True,
        step=partial(step, bits=bits),
        codes=None,
        value=value,
        opset=18,
        options=(bits,),
    )


_SYMMETRIC = (step_of_token, fake_quant_symmetric_blocks)
_ASYMMETRIC = (asymmetric_step_of_token, fake_quant_asymmetric_blocks)
INT4_BLOCK_32 = _by_blocks(int4_block_32, 4, *_SYMMETRIC)
INT2_BLOCK_32 = _by_blocks(int2_block_32, 2, *_SYMMETRIC)
INT8_BLOCK_32_ASYMMETRIC = _by_blocks(int8_block_32_asymmetric, 8, *_ASYMMETRIC)
INT4_BLOCK_32_ASYMMETRIC = _by_blocks(int4_block_32_asymmetric, 4, *_ASYMMETRIC)
INT2_BLOCK_32_ASYMMETRIC = _by_blocks(int2_block_32_asymmetric, 2, *_ASYMMETRIC)
