"""A stored tensor has a type, a shape and bytes, which are mapped from the data file and not read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray


@dataclass(frozen=True)
class StoredArray:
    """A stored tensor.

    Attributes:
        dtype: ONNX's number of its type.
        shape: its dimensions.
        nbytes: how many bytes there are of it.
        is_whole: whether those are as many as its type and shape say.
        read: returns the bytes, flat; of a data file, they are mapped anew at each call, so that none stays in memory.
    """

    dtype: int
    shape: tuple[int, ...]
    nbytes: int
    is_whole: bool
    read: Callable[[], NDArray[np.uint8]] = field(repr=False, compare=False)

    @property
    def raw(self) -> NDArray[np.uint8]:
        """The bytes, flat."""
        return self.read()

    @property
    def array(self) -> NDArray[Any]:
        """The values of a tensor that is whole, of a type that NumPy has."""
        return self.read().view(onnx.helper.tensor_dtype_to_np_dtype(self.dtype)).reshape(self.shape)


@dataclass(frozen=True)
class Span:
    """Where the bytes of a tensor lie in a data file; ``offset`` and ``length`` are -1 where they are no numbers."""

    location: str
    offset: int
    length: int


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's bytes lie in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def span_of(tensor: onnx.TensorProto) -> Span:
    """Return where the bytes of an external tensor lie."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    try:
        return Span(location, int(entries["offset"]), int(entries["length"]))
    except (KeyError, ValueError):
        return Span(location, -1, -1)


def size_of(tensor: onnx.TensorProto) -> int | None:
    """Return how many bytes a tensor takes, None of a type that has no size."""
    try:
        each: float = ir.DataType(tensor.data_type).itemsize
    except (ValueError, TypeError):
        return None
    count: int = math.prod(tensor.dims)
    return math.ceil(count * each)


def stored_array(tensor: onnx.TensorProto, folder: Path) -> StoredArray:
    """Return a tensor of a model whose data file, if there is one, lies in ``folder`` and was checked."""

    def mapped() -> NDArray[np.uint8]:
        return np.memmap(
            folder / span.location, dtype=np.uint8, mode="r", offset=span.offset, shape=(span.length,)
        )

    def held() -> NDArray[np.uint8]:
        raw = tensor.raw_data if tensor.HasField("raw_data") else onnx.numpy_helper.to_array(tensor).tobytes()
        return np.frombuffer(raw, dtype=np.uint8)

    span = span_of(tensor)
    outside = is_external(tensor)
    nbytes = span.length if outside else held().nbytes
    return StoredArray(
        tensor.data_type,
        tuple(tensor.dims),
        nbytes,
        nbytes == size_of(tensor),
        mapped if outside else held,
    )
