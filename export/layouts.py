"""How ternary codes lie in a file, made from the packed graph's bytes: four codes or five in each byte.

=====  ====================================================================
int2   the graph's own bytes, as an INT2 initialiser (opset 25)
bytes  the graph's own bytes
uint2  code + 2, as GatherBlockQuantized and MatMulNBits read it
base3  five codes a byte: the sum of (code + 1) * 3**i
=====  ====================================================================

Each has a twin, ``int2-transposed`` and so on, of the transposed matrix. A matrix lies in the file as its operator
reads it: what ONNX Runtime would transpose when it loads the file would take twice the memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
        convert: bytes of the file, a flat uint8 tensor, from the bytes of ``pack_codes`` and how many codes they hold.
        table: int8 ``(256, codes in a byte)``, the codes in each byte.
        transposed: whether the file stores the transposed matrix.
    """

    name: str
    convert: Callable[[Tensor, int], Tensor]
    table: Callable[[], Tensor]
    transposed: bool = False

    @property
    def turned(self) -> Layout:
        """The layout of the transposed matrix."""
        return LAYOUTS[f"{self.name}-transposed"]

    def written(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the matrix that the file stores."""
        return tuple(reversed(shape)) if self.transposed else tuple(shape)

    def size(self, shape: Sequence[int]) -> int:
        """Return how many bytes the file stores for a weight."""
        return -(-torch.Size(shape).numel() // self.table().shape[1])

    def encode(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the file's bytes, a flat uint8 tensor, from the packed graph's bytes and the weight's shape."""
        if self.transposed:
            packed = pack_codes(unpack_codes(packed, shape).t())
        return self.convert(packed, torch.Size(shape).numel())

    def decode(self, stored: Tensor, shape: Sequence[int]) -> Tensor:
        """Return int8 codes of the weight's shape from the file's bytes, a flat uint8 tensor."""
        codes = self.table()[stored.long()].reshape(-1)[: torch.Size(shape).numel()].view(self.written(shape))
        return codes.t() if self.transposed else codes


def _same(packed: Tensor, count: int) -> Tensor:
    return packed


def _biased(packed: Tensor, count: int) -> Tensor:
    return packed ^ BIASED


def _base3(packed: Tensor, count: int) -> Tensor:
    digits = (unpack_codes(packed, (count,)) + 1).to(torch.uint8)
    digits = torch.nn.functional.pad(digits, (0, -count % _TRITS), value=1).view(-1, _TRITS)
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
BASE3 = Layout("base3", _base3, _base3_table)

LAYOUTS: dict[str, Layout] = {}
for _layout in (INT2, BYTES, UINT2, BASE3):
    _turned = replace(_layout, name=f"{_layout.name}-transposed", transposed=True)
    LAYOUTS |= {_layout.name: _layout, _turned.name: _turned}
