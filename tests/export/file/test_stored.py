"""A stored tensor is the same wherever its bytes lie, and those of a data file are mapped when they are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ti_fx.export.file.stored import StoredArray, size_of, span_of, stored_array

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def outside(folder: Path) -> TensorProto:
    (folder / "a.data").write_bytes(bytes(8) + VALUES.tobytes())
    tensor = TensorProto(name="a", data_type=TensorProto.FLOAT, dims=VALUES.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "a.data", "offset": "8", "length": str(VALUES.nbytes)}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.mark.parametrize("place", ["raw", "typed", "outside"])
def test_a_tensor_is_the_same_wherever_its_bytes_lie(place: str, tmp_path: Path) -> None:
    tensor = {
        "raw": lambda: numpy_helper.from_array(VALUES, "a"),
        "typed": lambda: helper.make_tensor("a", TensorProto.FLOAT, VALUES.shape, VALUES.ravel().tolist()),
        "outside": lambda: outside(tmp_path),
    }[place]()
    stored = stored_array(tensor, tmp_path)
    assert (stored.dtype, stored.shape, stored.nbytes) == (TensorProto.FLOAT, (2, 3), 24)
    assert stored.is_whole
    assert stored.raw.tobytes() == VALUES.tobytes()
    np.testing.assert_array_equal(stored.array, VALUES)


def test_bytes_of_a_data_file_are_mapped_when_they_are_asked_for(tmp_path: Path) -> None:
    stored = stored_array(outside(tmp_path), tmp_path)
    assert isinstance(stored.raw, np.memmap)
    (tmp_path / "a.data").unlink()
    assert (stored.nbytes, stored.is_whole) == (24, True)
    with pytest.raises(FileNotFoundError):
        _ = stored.raw


def test_a_tensor_that_was_cut_short_is_not_whole(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(VALUES, "a")
    tensor.raw_data = tensor.raw_data[:-1]
    stored: StoredArray = stored_array(tensor, tmp_path)
    assert (stored.nbytes, stored.is_whole) == (23, False)


def test_a_type_without_a_size_and_a_place_without_numbers(tmp_path: Path) -> None:
    assert size_of(onnx.TensorProto(data_type=TensorProto.STRING, dims=[2])) is None
    tensor = outside(tmp_path)
    tensor.external_data[1].value = "x"
    assert (span_of(tensor).offset, span_of(tensor).length) == (-1, -1)
