"""One object per encoding: training numerics and storage together, so that the two can't disagree.

The ONNX side lies in ``ti_fx.export``: of the numerics in ``lowering``, of the storage in ``storage``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
                "'auto' is measured before training, by TernaryTrainer or ti-fx train; here, give the name that "
                "ti_fx.measure.choose_encoding or ti-fx choose says"
            ) from None
        raise InputError(f"unknown encoding {name!r}{did_you_mean(str(name), ENCODINGS)}") from None


def encoding_of_numerics(function: object) -> Encoding | None:
    """Return the first encoding with this activation fake-quantiser, None if it is no fake-quantiser."""
    found = (encoding for encoding in ENCODINGS.values() if encoding.fake_quant is function)
    return next(found, None) if function is not None else None
