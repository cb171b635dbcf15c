"""How ternary codes lie in a file, made from the packed graph's bytes: four codes or five in each byte.

==================  ==========================================================================================
int2                the graph's own bytes, as an INT2 initialiser (opset 25)
bytes               the graph's own bytes
uint2               code + 2, as ONNX Runtime's GatherBlockQuantized and MatMulNBits read it
uint2-transposed    the same of the transposed matrix, where a linear layer stores (inputs, outputs), as GPT-2's do
base3               five codes a byte: the sum of (code + 1) * 3**i
==================  ==========================================================================================
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ti_fx.encodings import pack_codes, unpack_codes

BIASED = 0b10101010  # exclusive-or turns four two's complement codes into codes + 2
_TRITS = 5


@dataclass(frozen=True)
class Layout:
    """One way to store codes.

    Attributes:
        name: as the file's own table of tensors calls it.
        encode: bytes of the file, a flat uint8 tensor, from the packed graph's bytes and the weight's shape.
        table: int8 ``(256, codes in a byte)``, the codes in each byte.
        transposed: whether the file stores the transposed matrix.
    """

    name: str
    encode: Callable[[Tensor, Sequence[int]], Tensor]
    table: Callable[[], Tensor]
    transposed: bool = False

    def decode(self, stored: Tensor, shape: Sequence[int]) -> Tensor:
        """Return int8 codes of the weight's shape from the file's bytes, a flat uint8 tensor."""
        written = tuple(reversed(shape)) if self.transposed else tuple(shape)
        codes = self.table()[stored.long()].reshape(-1)[: torch.Size(shape).numel()].view(written)
        return codes.t() if self.transposed else codes


def _same(packed: Tensor, shape: Sequence[int]) -> Tensor:
    return packed


def _biased(packed: Tensor, shape: Sequence[int]) -> Tensor:
    return packed ^ BIASED


def _biased_transposed(packed: Tensor, shape: Sequence[int]) -> Tensor:
    return pack_codes(unpack_codes(packed, shape).t()) ^ BIASED


def _base3(packed: Tensor, shape: Sequence[int]) -> Tensor:
    digits = (unpack_codes(packed, shape).reshape(-1) + 1).to(torch.uint8)
    digits = torch.nn.functional.pad(digits, (0, -digits.numel() % _TRITS), value=1).view(-1, _TRITS)
    stored = digits[:, _TRITS - 1].clone()
    for place in reversed(range(_TRITS - 1)):
        stored = stored.mul_(3).add_(digits[:, place])  # at most 242
    return stored


def _every_byte() -> Tensor:
    return torch.arange(256, dtype=torch.int16).to(torch.uint8)


@functools.cache
def _two_bit_table() -> Tensor:
    return unpack_codes(_every_byte(), (256, 4))


@functools.cache
def _biased_table() -> Tensor:
    return unpack_codes(_every_byte() ^ BIASED, (256, 4))


@functools.cache
def _base3_table() -> Tensor:
    """Of the bytes 243 to 255, which no codes give, the last digit is 3 and its code 2: no ternary code."""
    places = torch.tensor([3**place for place in range(_TRITS)])
    quotients = torch.arange(256).unsqueeze(1) // places
    digits = torch.cat([quotients[:, :-1] % 3, quotients[:, -1:]], dim=1)
    return (digits - 1).to(torch.int8)


INT2 = Layout("int2", _same, _two_bit_table)
BYTES = Layout("bytes", _same, _two_bit_table)
UINT2 = Layout("uint2", _biased, _biased_table)
UINT2_TRANSPOSED = Layout("uint2-transposed", _biased_transposed, _biased_table, transposed=True)
BASE3 = Layout("base3", _base3, _base3_table)

LAYOUTS = {layout.name: layout for layout in (INT2, BYTES, UINT2, UINT2_TRANSPOSED, BASE3)}
