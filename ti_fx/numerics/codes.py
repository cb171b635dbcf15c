"""Ternary codes in bytes: four codes a byte, two bits each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CODES_PER_BYTE = 4


def pack_codes(codes: Tensor) -> Tensor:
    """Pack ternary codes four to a byte, row-major, first code in the lowest two bits, two's complement.

    This is ONNX INT2's own layout. ``codes``: int8 in {-1, 0, 1}, any shape of n elements.
    Returns uint8 of shape ``(ceil(n / 4),)``; padding bits are zero.
    """
    flat = codes.reshape(-1).view(torch.uint8) & 3
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % CODES_PER_BYTE)).view(-1, CODES_PER_BYTE)
    return padded[:, 0] | padded[:, 1] << 2 | padded[:, 2] << 4 | padded[:, 3] << 6


def unpack_codes(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo :func:`pack_codes`: int8 codes in {-1, 0, 1} of the given shape."""
    every_byte = torch.arange(256, dtype=torch.uint8, device=packed.device)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    two_bits = ((every_byte.unsqueeze(1) >> shifts) & 3).to(torch.int8)
    table = torch.where(two_bits == 3, -1, two_bits).to(torch.int8)
    # the four codes of a byte are looked up as one number: a fifth of the time of shifts over all of them
    codes = table.view(torch.int32).squeeze(1).index_select(0, packed.int()).view(torch.int8)
    return codes[: int(torch.Size(shape).numel())].view(tuple(shape))


def spread(scale: Tensor, group: int, size: int) -> Tensor:
    """Return a scale as it is multiplied: one a group, ``(..., groups)``, is repeated to ``(..., size)``.

    Args:
        scale: as the codes' granularity gives it.
        group: neighbours that share one; 0: a row or the tensor has one, and it is returned as it is.
        size: of the weight's last dimension; the last group may be shorter.
    """
    return scale.repeat_interleave(group, dim=-1)[..., :size] if group else scale


def unpack_ternary(
    packed: Tensor,
    scale: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    group: int = 0,
    offset: Tensor | None = None,
) -> Tensor:
    """Return the ternary weight from packed codes, ``(codes * scale).to(dtype)``: the training value bit for bit.

    Args:
        packed: uint8 from :func:`pack_codes`.
        scale: float32 or float64, shape ``()`` or ``(rows, 1, ...)``; with groups ``(..., groups)``.
        shape: the weight's shape.
        dtype: the weight's dtype.
        group: neighbours of the last dimension that share a scale, 0 without groups.
        offset: what is added, of the scale's shape; None: nothing.
    """
    value = unpack_codes(packed, shape).to(scale.dtype).mul_(spread(scale, group, shape[-1]))
    return (value if offset is None else value.add_(spread(offset, group, shape[-1]))).to(dtype)
