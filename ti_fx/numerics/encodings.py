"""An encoding says how a student's quantised layers compute and how a file stores them, so that the two can't disagree.

The table is plain data and needs no torch. What a quantiser computes, in training and in the file, lies in
``ti_fx.numerics.quantisers``; what a storage looks like, in ``ti_fx.numerics.layouts``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ti_fx.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from ti_fx.numerics.quantiser import Quantiser

Storage = Literal["two-bit", "bytes", "base3"]
Kept = Literal["float32", "float16"]
AUTO = "auto"  # no encoding: the one that measuring the model chooses
NEWEST_OPSET = 25  # the first with the type INT2


@dataclass(frozen=True)
class Encoding:
    """How quantised layers compute, in training and in the exported file, and how the file stores their codes.

    Attributes:
        name: as written in a recipe.
        numerics: the name of its activation quantiser, None for float activations.
        description: one line for people.
        storage: ``two-bit`` (in the type or the operator of ONNX Runtime that suits the reader), ``bytes`` (four codes
            a byte, standard operators alone) or ``base3`` (five codes a byte, standard operators alone).
        opset: the ONNX opset that is written unless another is asked for.
        kept: the type in which ``Pack`` stores what is not ternary unless another is asked for.
    """

    name: str
    numerics: str | None
    description: str
    storage: Storage = "two-bit"
    opset: int = NEWEST_OPSET
    kept: Kept = "float32"

    @property
    def quantiser(self) -> Quantiser | None:
        """The activation quantiser, None for float activations."""
        from ti_fx.numerics.quantisers import QUANTISERS  # needs torch

        return None if self.numerics is None else QUANTISERS[self.numerics]

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's result is independent of what else is in the batch."""
        return self.quantiser is None or self.quantiser.batch_invariant


_NEIGHBOURS = "32 neighbours of a token, which the file multiplies as floats"
_FEW_BITS: tuple[tuple[str, str, str, tuple[int, ...]], ...] = (
    ("tensor", "asymmetric", "tensor", (4, 2)),
    ("tensor-symmetric", "symmetric", "tensor", (4, 2)),
    ("token", "symmetric", "token", (4, 2)),
    ("token-asymmetric", "asymmetric", "token", (8, 4, 2)),
    ("learned", "symmetric", "tensor, which is learned and a constant of the file", (8, 4, 2)),
    ("block-32", "symmetric", _NEIGHBOURS, (4, 2)),
    ("block-32-asymmetric", "asymmetric", _NEIGHBOURS, (8, 4, 2)),
)  # name, kind and range of encodings whose quantisers differ in bits alone, and which bits there are

ENCODINGS: dict[str, Encoding] = {
    encoding.name: encoding
    for encoding in (
        Encoding(
            "int8-tensor",
            "int8_tensor",
            "asymmetric uint8 activations, one range per tensor (DynamicQuantizeLinear)",
        ),
        Encoding("int8-token", "int8_token", "symmetric int8 activations, one range per token"),
        Encoding(
            "reference",
            "int8_reference",
            "symmetric int8 activations, one range per tensor, as the TI paper's code",
        ),
        Encoding(
            "nbits2",
            "int8_block_128",
            "symmetric int8 activations, one range per 128 neighbours of a token; weights packed in RAM (MatMulNBits)",
        ),
        Encoding("nbits2-64", "int8_block_64", "as nbits2, one range per 64 neighbours"),
        Encoding("nbits2-32", "int8_block_32", "as nbits2, one range per 32 neighbours"),
        Encoding(
            "portable",
            "int8_tensor",
            "computes as int8-tensor; opset 18 and standard operators alone",
            storage="bytes",
            opset=18,
        ),
        Encoding(
            "base3",
            "int8_tensor",
            "computes as int8-tensor; five codes a byte on disk, 1.6 bits each, what is kept in half precision",
            storage="base3",
            kept="float16",
        ),
        *(
            Encoding(
                f"int{bits}-{ranges}",
                f"int{bits}_{ranges}".replace("-", "_"),
                f"{kind} activations of {bits} bits, one range per {whose}",
            )
            for ranges, kind, whose, every in _FEW_BITS
            for bits in every
        ),
        Encoding("float", None, "activations stay in floating point"),
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


def encoding_with(quantiser: Quantiser) -> Encoding:
    """Return the first encoding that computes by a quantiser, for a graph in which none was recorded.

    Raises:
        InputError: no encoding has it.
    """
    for encoding in ENCODINGS.values():
        if encoding.numerics == quantiser.name:
            return encoding
    raise InputError(
        f"no encoding computes by {quantiser.name}; add one to ti_fx.numerics.encodings.ENCODINGS"
    )


@dataclass(frozen=True)
class WeightEncodings:
    """The names of the encodings of a student's weights.

    Attributes:
        name: of most of them.
        others: of each weight that has another, by parameter name.
    """

    name: str
    others: Mapping[str, str] = field(default_factory=dict)

    def of(self, weight: str) -> str:
        """Return the name of a weight's encoding."""
        return self.others.get(weight, self.name)

    def __str__(self) -> str:
        return ", ".join([self.name, *(f"{weight}={name}" for weight, name in self.others.items())])
