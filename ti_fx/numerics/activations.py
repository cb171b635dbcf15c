"""Fake-quantisation as plain functions with straight-through gradients; no graph code here.

Sources: Ternary Weight Networks (Li et al., arXiv 1605.04711), TernaryBERT (Zhang et al., EMNLP 2020) and Teacher
Intervention (Kim et al., EACL 2023, arXiv 2302.11812) for weights; ONNX DynamicQuantizeLinear-11 for ``int8_tensor``;
ONNX Runtime's MatMulNBits, by experiment, for ``int8_block_128``.

Statistics are computed in at least float32, whatever autocast says; wider inputs keep their type.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ti_fx.numerics.precision import at_least_float32


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, kind: str) -> Tensor:
        if (
            isinstance(value.numel(), int) and not value.numel()
        ):  # an expert that no token goes to; no symbolic size
            return value.clone()
        return _FAKE_QUANT[kind](at_least_float32(value)).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _one_where_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _tensor_asymmetric(value: Tensor) -> Tensor:
    low, high = value.amin().clamp(max=0), value.amax().clamp(min=0)
    scale = _one_where_zero((high - low) / 255)
    zero_point = (-low / scale).clamp(0, 255).round()
    codes = (value / scale).round_().add_(zero_point).clamp_(0, 255)
    return codes.sub_(zero_point).mul_(scale)


def _token_symmetric(value: Tensor) -> Tensor:
    scale = _one_where_zero(value.abs().amax(dim=-1, keepdim=True) / 127)
    return (value / scale).round_().clamp_(-127, 127).mul_(scale)


def _tensor_symmetric(value: Tensor) -> Tensor:
    scale = _one_where_zero(value.abs().amax() / 127)
    return (value / scale).round_().clamp_(-127, 127).mul_(scale)


def _block_symmetric(value: Tensor, block: int) -> Tensor:
    length = value.shape[-1]
    padded = torch.nn.functional.pad(value, (0, -length % block))
    blocks = padded.reshape(*value.shape[:-1], (length + block - 1) // block, block)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    # a tensor over a tensor: PyTorch computes 127 / tensor as 127 * (1 / tensor), which rounds otherwise
    inverse = torch.full_like(largest, 127) / largest
    inverse = torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))
    codes = (blocks * inverse).round_().clamp_(-127, 127)
    return codes.mul_(largest / 127).reshape(padded.shape)[..., :length]


_FAKE_QUANT: dict[str, Callable[[Tensor], Tensor]] = {
    "int8-tensor": _tensor_asymmetric,
    "int8-token": _token_symmetric,
    "reference": _tensor_symmetric,
    "int8-block-32": functools.partial(_block_symmetric, block=32),
    "int8-block-64": functools.partial(_block_symmetric, block=64),
    "int8-block-128": functools.partial(_block_symmetric, block=128),
}


def _fake_quant(value: Tensor, kind: str) -> Tensor:
    result: Tensor = _StraightThrough.apply(value, kind)  # type: ignore[no-untyped-call]
    return result


def int8_tensor(value: Tensor) -> Tensor:
    """Asymmetric uint8 over the whole tensor, as ONNX DynamicQuantizeLinear computes it; straight-through gradient.

    scale = (max(x, 0) - min(x, 0)) / 255, zero point = round(-min / scale), codes = round(x / scale) + zero point
    clamped to 0..255, rounding half to even. Same shape and dtype as ``value`` (floating).
    """
    return _fake_quant(value, "int8-tensor")


def int8_token(value: Tensor) -> Tensor:
    """Symmetric int8 with one scale per token (per vector along the last dimension): scale = max|x| / 127."""
    return _fake_quant(value, "int8-token")


def int8_reference(value: Tensor) -> Tensor:
    """Symmetric int8 over the whole tensor, scale = max|x| / 127: the activation quantiser of the published code."""
    return _fake_quant(value, "reference")


def int8_block_32(value: Tensor) -> Tensor:
    """Symmetric int8 with one scale per 32 neighbours along the last dimension: see :func:`int8_block_128`."""
    return _fake_quant(value, "int8-block-32")


def int8_block_64(value: Tensor) -> Tensor:
    """Symmetric int8 with one scale per 64 neighbours along the last dimension: see :func:`int8_block_128`."""
    return _fake_quant(value, "int8-block-64")


def int8_block_128(value: Tensor) -> Tensor:
    """Symmetric int8 with one scale per 128 neighbours along the last dimension; straight-through gradient.

    What ONNX Runtime's MatMulNBits does to its input at accuracy_level 4: codes = round(x * (127 / max|x|)), half to
    even, scale = max|x| / 127; the last block may be shorter; a block of zeros stays zero.
    """
    return _fake_quant(value, "int8-block-128")


def detach(value: Tensor) -> Tensor:
    """Stop the gradient: the same values, with nothing behind them to train (arXiv 2302.11812, section 3)."""
    return value.detach()
