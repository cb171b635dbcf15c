"""Symmetric int8 with one scale per 32, 64 or 128 neighbours of a token, as ONNX Runtime's MatMulNBits computes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ti_fx.numerics.gradients import straight_through
from ti_fx.numerics.onnx_nodes import since_opset
from ti_fx.numerics.quantiser import Quantiser, step_of_token


def int8_block_32(value: Tensor) -> Tensor:
    """Symmetric int8 with one scale per 32 neighbours along the last dimension: see :func:`int8_block_128`."""
    return straight_through(value, partial(_rounded, block=32))


def int8_block_64(value: Tensor) -> Tensor:
    """Symmetric int8 with one scale per 64 neighbours along the last dimension: see :func:`int8_block_128`."""
    return straight_through(value, partial(_rounded, block=64))


def int8_block_128(value: Tensor) -> Tensor:
    """Symmetric int8 with one scale per 128 neighbours along the last dimension; straight-through gradient.

    What ONNX Runtime's MatMulNBits does to its input at accuracy_level 4, by experiment: codes =
    round(x * (127 / max|x|)), half to even, scale = max|x| / 127; the last block may be shorter; a block of zeros stays
    zero.
    """
    return straight_through(value, partial(_rounded, block=128))


def _rounded(value: Tensor, block: int) -> Tensor:
    length = value.shape[-1]
    padded = torch.nn.functional.pad(value, (0, -length % block))
    blocks = padded.reshape(*value.shape[:-1], (length + block - 1) // block, block)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    # a tensor over a tensor: PyTorch computes 127 / tensor as 127 * (1 / tensor), which rounds otherwise
    inverse = torch.full_like(largest, 127) / largest
    inverse = torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))
    codes = (blocks * inverse).round_().clamp_(-127, 127)
    return codes.mul_(largest / 127).reshape(padded.shape)[..., :length]


@since_opset(18)
def fake_quant_block(value: Tensor, block: int) -> Tensor:
    """Return the fake-quantised value in ONNX; the last dimension may be dynamic."""
    length = value.shape[-1]
    blocks = (length + block - 1) // block  # of positive numbers: ONNX divides negative ones in another way
    padded = torch.nn.functional.pad(value, (0, blocks * block - length))
    parts = padded.reshape([*value.shape[:-1], blocks, block])
    largest = parts.abs().amax(dim=-1, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest
    inverse = torch.where(torch.isinf(inverse), torch.zeros_like(inverse), inverse)
    codes = (parts * inverse).round().clamp(-127, 127)
    return (codes * (largest / 127)).reshape(padded.shape)[..., :length]


def _by_blocks(function: Callable[[Tensor], Tensor], block: int) -> Quantiser:
    return Quantiser(
        function,
        batch_invariant=True,
        step=step_of_token,
        codes=None,
        value=fake_quant_block,
        opset=18,
        block=block,
        options=(block,),
    )


INT8_BLOCK_32 = _by_blocks(int8_block_32, 32)
INT8_BLOCK_64 = _by_blocks(int8_block_64, 64)
INT8_BLOCK_128 = _by_blocks(int8_block_128, 128)
