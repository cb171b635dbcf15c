"""One object per encoding: training numerics and storage together, so that the two can't disagree.

The ONNX side of each encoding registers itself in ``ti_fx.export`` under the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ti_fx import numerics
from ti_fx.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Encoding:
    """How quantised layers compute, in training and in the exported file.

    Attributes:
        name: as written in a recipe.
        fake_quant: the activation fake-quantiser used in training, None for float activations.
        batch_invariant: whether a row's result is independent of what else is in the batch.
        description: one line for people.
    """

    name: str
    fake_quant: Callable[[Tensor], Tensor] | None
    batch_invariant: bool
    description: str


ENCODINGS: dict[str, Encoding] = {
    encoding.name: encoding
    for encoding in (
        Encoding(
            "int8-tensor",
            numerics.int8_tensor,
            False,
            "asymmetric uint8 activations, one range per tensor (DynamicQuantizeLinear)",
        ),
        Encoding("int8-token", numerics.int8_token, True, "symmetric int8 activations, one range per token"),
        Encoding(
            "reference",
            numerics.int8_reference,
            False,
            "symmetric int8 activations, one range per tensor, as the TI paper's code",
        ),
        Encoding("float", None, True, "activations stay in floating point"),
    )
}


def get_encoding(name: str) -> Encoding:
    """Return the encoding called ``name``.

    Raises:
        InputError: there is none; the message lists near names.
    """
    try:
        return ENCODINGS[name]
    except KeyError:
        raise InputError(f"unknown encoding {name!r}{did_you_mean(name, ENCODINGS)}") from None


CODES_PER_BYTE = 4


def pack_codes(codes: Tensor) -> Tensor:
    """Pack ternary codes four to a byte, row-major, first code in the lowest two bits, two's complement.

    This is ONNX INT2's own layout. ``codes``: int8 in {-1, 0, 1}, any shape of n elements.
    Returns uint8 of shape ``(ceil(n / 4),)``; padding bits are zero.
    """
    flat = (codes.reshape(-1).to(torch.int16) & 3).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % CODES_PER_BYTE)).view(-1, CODES_PER_BYTE)
    return padded[:, 0] | padded[:, 1] << 2 | padded[:, 2] << 4 | padded[:, 3] << 6


def unpack_codes(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo :func:`pack_codes`: int8 codes in {-1, 0, 1} of the given shape."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    two_bits = (packed.unsqueeze(1) >> shifts) & 3
    count = int(torch.Size(shape).numel())
    codes = two_bits.reshape(-1)[:count].to(torch.int8)
    return torch.where(codes == 3, -1, codes).to(torch.int8).view(tuple(shape))


def unpack_ternary(packed: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the ternary weight from packed codes, ``(codes * scale).to(dtype)``: the training value bit for bit.

    Args:
        packed: uint8 from :func:`pack_codes`.
        scale: float32 or float64, shape ``()`` or ``(rows, 1, ...)``.
        shape: the weight's shape.
        dtype: the weight's dtype.
    """
    return (unpack_codes(packed, shape) * scale).to(dtype)
