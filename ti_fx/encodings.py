"""One object per encoding: training numerics and storage together, so that the two can't disagree.

The ONNX side lies in ``ti_fx.export``: of the numerics in ``lowering``, of the storage in ``storage``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ti_fx import numerics
from ti_fx.errors import InputError, did_you_mean

Storage = Literal["two-bit", "bytes", "base3"]
Kept = Literal["float32", "float16"]
AUTO = "auto"  # no encoding: the one that measuring the model chooses
NEWEST_OPSET = 25  # the first with the type INT2


@dataclass(frozen=True)
class Encoding:
    """How quantised layers compute, in training and in the exported file, and how the file stores their codes.

    Attributes:
        name: as written in a recipe.
        fake_quant: the activation fake-quantiser used in training, None for float activations.
        batch_invariant: whether a row's result is independent of what else is in the batch.
        description: one line for people.
        storage: ``two-bit`` (in the type or the operator of ONNX Runtime that suits the reader), ``bytes`` (four codes
            a byte, standard operators alone) or ``base3`` (five codes a byte, standard operators alone).
        opset: the ONNX opset that is written unless another is asked for.
        kept: the type in which ``Pack`` stores what is not ternary unless another is asked for.
    """

    name: str
    fake_quant: Callable[[Tensor], Tensor] | None
    batch_invariant: bool
    description: str
    storage: Storage = "two-bit"
    opset: int = NEWEST_OPSET
    kept: Kept = "float32"


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
        Encoding(
            "nbits2",
            numerics.int8_block_128,
            True,
            "symmetric int8 activations, one range per 128 neighbours of a token; weights packed in RAM (MatMulNBits)",
        ),
        Encoding("nbits2-64", numerics.int8_block_64, True, "as nbits2, one range per 64 neighbours"),
        Encoding("nbits2-32", numerics.int8_block_32, True, "as nbits2, one range per 32 neighbours"),
        Encoding(
            "portable",
            numerics.int8_tensor,
            False,
            "computes as int8-tensor; opset 18 and standard operators alone",
            "bytes",
            18,
        ),
        Encoding(
            "base3",
            numerics.int8_tensor,
            False,
            "computes as int8-tensor; five codes a byte on disk, 1.6 bits each, what is kept in half precision",
            "base3",
            kept="float16",
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
    except (KeyError, TypeError):  # a list has no hash
        if name == AUTO:
            raise InputError(
                "'auto' is measured before training, by QuantizeActivations(encoding='auto') or ti-fx train; here, "
                "give the name that ti_fx.export.choose_encoding or ti-fx choose says"
            ) from None
        raise InputError(f"unknown encoding {name!r}{did_you_mean(str(name), ENCODINGS)}") from None


def encoding_of_numerics(function: object) -> Encoding | None:
    """Return the first encoding with this activation fake-quantiser, None if it is no fake-quantiser."""
    found = (encoding for encoding in ENCODINGS.values() if encoding.fake_quant is function)
    return next(found, None) if function is not None else None


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


def unpack_ternary(packed: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the ternary weight from packed codes, ``(codes * scale).to(dtype)``: the training value bit for bit.

    Args:
        packed: uint8 from :func:`pack_codes`.
        scale: float32 or float64, shape ``()`` or ``(rows, 1, ...)``.
        shape: the weight's shape.
        dtype: the weight's dtype.
    """
    return unpack_codes(packed, shape).to(scale.dtype).mul_(scale).to(dtype)
