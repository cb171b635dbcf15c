"""Fake-quantisation as plain functions with straight-through gradients; no graph code here.

Sources: Ternary Weight Networks (Li et al., arXiv 1605.04711), TernaryBERT (Zhang et al., EMNLP 2020) and Teacher
Intervention (Kim et al., EACL 2023, arXiv 2302.11812) for weights; ONNX DynamicQuantizeLinear-11 for ``int8_tensor``;
ONNX Runtime's MatMulNBits, by experiment, for ``int8_block_128``.

Statistics are computed in at least float32, whatever autocast says; wider inputs keep their type.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Granularity = Literal["tensor", "row"]

CLIP = 2.5  # latent weights are clamped to [-2.5, 2.5]; outside, the gradient is zero


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def ternary_codes(
    weight: Tensor, granularity: Granularity = "tensor", clip: float = CLIP
) -> tuple[Tensor, Tensor]:
    """Split a weight into ternary codes and scale: ``codes * scale`` is the ternary weight.

    With W clamped to [-clip, clip]: threshold t = 0.7 * mean|W|, codes = +1 where W > t, -1 where W < -t, else 0, and
    scale = mean of |W| over the entries beyond t (0 if there are none).

    Args:
        weight: floating, any shape of at least one dimension.
        granularity: ``tensor`` (one scale) or ``row`` (one scale per index of dimension 0).
        clip: half-width of the range that latent weights are clamped to.

    Returns:
        codes: int8 in {-1, 0, 1}, shape of ``weight``.
        scale: float32 (float64 for float64 weights), shape ``()``, or ``(rows, 1, ...)`` for ``row``.
    """
    signs, scale = _signs_and_scale(weight.detach(), granularity, clip)
    return signs.to(torch.int8), scale


def _signs_and_scale(weight: Tensor, granularity: Granularity, clip: float) -> tuple[Tensor, Tensor]:
    """Return the codes as floats of their own storage, and the scale.

    Two buffers, edited in place: a fresh buffer the size of a word embedding costs ten times an edit of an old one.
    """
    if granularity not in ("tensor", "row"):
        raise ValueError(f"granularity is {granularity!r}; use 'tensor' or 'row'")
    keep = granularity == "row"
    dims = tuple(range(1 if keep else 0, weight.dim()))
    wide = _wide(weight)
    magnitude = wide.abs().clamp_(max=clip)
    # a literal: torch.compile(dynamic=True) takes a module-level float for a symbol and fails in autograd.Function
    threshold = 0.7 * magnitude.mean(dim=dims, keepdim=keep)
    signs = magnitude.clone().gt_(threshold)
    # float32 counts exactly up to 2**24: enough for a vector, so vectors are counted first
    count = signs.sum(dim=-1, keepdim=True).sum(dim=dims, keepdim=keep, dtype=torch.float64).clamp(min=1)
    scale = magnitude.mul_(signs).sum(dim=dims, keepdim=keep) / count.to(magnitude.dtype)
    return signs.copysign_(wide).sign_(), scale  # sign_ turns -0.0 into 0.0


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, granularity: Granularity, clip: float) -> Tensor:
        signs, scale = _signs_and_scale(weight, granularity, clip)
        ctx.save_for_backward(weight)
        ctx.clip = clip
        return signs.mul_(scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        # the gradient where -clip < weight < clip, else 0, in one sweep
        inside = torch.ops.aten.hardtanh_backward(gradients[0], weight, -ctx.clip, ctx.clip)
        return inside, None, None


def ternary(weight: Tensor, granularity: Granularity = "tensor", clip: float = CLIP) -> Tensor:
    """Return the ternary weight ``codes * scale`` of :func:`ternary_codes`; same shape and dtype as ``weight``.

    Gradient: straight-through where |weight| < clip, zero elsewhere.
    """
    result: Tensor = _Ternary.apply(weight, granularity, clip)  # type: ignore[no-untyped-call]
    return result


def ternary_embedding(weight: Tensor, indices: Tensor, *options: Any, clip: float = CLIP) -> Tensor:
    """Return ``embedding(ternary(weight, "row"), indices, *options)``, quantising only the rows that are looked up.

    Values and gradients are the same bit for bit, as each row has its own scale; ``weight`` has two dimensions.
    """
    rows = torch.ops.aten.embedding.default(weight, indices, *options)
    return ternary(rows.flatten(0, -2), "row", clip).view_as(rows)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, kind: str) -> Tensor:
        if (
            isinstance(value.numel(), int) and not value.numel()
        ):  # an expert that no token goes to; no symbolic size
            return value.clone()
        return _FAKE_QUANT[kind](_wide(value)).to(value.dtype)

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
