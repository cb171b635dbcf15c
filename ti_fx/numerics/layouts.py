"""How ternary codes lie in a file, made from the packed graph's bytes: four codes or five in each byte.

=====  ====================================================================
int2   the graph's own bytes, as an INT2 initialiser (opset 25)
bytes  the graph's own bytes
uint2  code + 2, as GatherBlockQuantized and MatMulNBits read it
base3  five codes a byte: the sum of (code + 1) * 3**i
=====  ====================================================================

Each has a twin, ``int2-transposed`` and so on, of the transposed matrix. A matrix lies in the file as its operator
reads it: what ONNX Runtime would transpose when it loads the file would take twice the memory.

``bytes-rows`` and ``base3-rows`` are of tables: each row begins with a byte, so that rows are looked up as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ti_fx.numerics.codes import pack_codes, unpack_codes

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
        rows: whether each row begins with a byte; codes of value 0 fill the last one.
    """

    name: str
    convert: Callable[[Tensor, int], Tensor]
    table: Callable[[], Tensor]
    transposed: bool = False
    rows: bool = False

    @property
    def per_byte(self) -> int:
        """How many codes are in a byte."""
        return self.table().shape[1]

    @property
    def table_name(self) -> str:
        """The name of the table in a file that unpacks by it."""
        return f"codes_of_{self.name.partition('-')[0]}"

    @property
    def turned(self) -> Layout:
        """The layout of the transposed matrix."""
        return LAYOUTS[f"{self.name}-transposed"]

    def written(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the matrix that the file stores."""
        return tuple(reversed(shape)) if self.transposed else tuple(shape)

    def stored(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the uint8 tensor that the file stores for a weight: flat, or ``(rows, bytes)``."""
        if self.rows:
            return (shape[0], -(-shape[1] // self.per_byte))
        return (-(-torch.Size(shape).numel() // self.per_byte),)

    def encode(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the file's bytes, a flat uint8 tensor, from the packed graph's bytes and the weight's shape."""
        count = torch.Size(shape).numel()
        if self.transposed:
            packed = pack_codes(unpack_codes(packed, shape).t())
        elif self.rows and shape[1] % self.per_byte:
            codes = nn.functional.pad(unpack_codes(packed, shape), (0, -shape[1] % self.per_byte))
            packed, count = pack_codes(codes), codes.numel()
        return self.convert(packed, count)

    def decode(self, stored: Tensor, shape: Sequence[int]) -> Tensor:
        """Return int8 codes of the weight's shape from the file's bytes, a flat uint8 tensor."""
        codes = self.table()[stored.long()].reshape(-1)
        if self.rows:
            return codes.view(shape[0], -1)[:, : shape[1]]
        codes = codes[: torch.Size(shape).numel()].view(self.written(shape))
        return codes.t() if self.transposed else codes


def _same(packed: Tensor, count: int) -> Tensor:
    return packed


def _biased(packed: Tensor, count: int) -> Tensor:
    return packed ^ BIASED


def _base3(packed: Tensor, count: int) -> Tensor:
    digits = (unpack_codes(packed, (count,)) + 1).to(torch.uint8)
    digits = nn.functional.pad(digits, (0, -count % _TRITS), value=1).view(-1, _TRITS)
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

BYTES_ROWS = replace(BYTES, name="bytes-rows", rows=True)
BASE3_ROWS = replace(BASE3, name="base3-rows", rows=True)

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (BYTES_ROWS, BASE3_ROWS)}
for _layout in (INT2, BYTES, UINT2, BASE3):
    _turned = replace(_layout, name=f"{_layout.name}-transposed", transposed=True)
    LAYOUTS |= {_layout.name: _layout, _turned.name: _turned}
