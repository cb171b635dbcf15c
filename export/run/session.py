"""``Runtime`` runs an exported file in ONNX Runtime, with options that suit it, and refuses unfit inputs."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from ti_fx.errors import InputError, first_line
from ti_fx.export import arguments
from ti_fx.export.file.checks import from_json
from ti_fx.export.file.external_data import metadata_in, require_data_of
from ti_fx.export.file.intact import require_intact
from ti_fx.export.file.metadata import ASSUMPTIONS, CHECKS, LARGEST, ROWS, value_of
from ti_fx.export.file.minimum_runtime import require_runtime
from ti_fx.ir.assumptions import Assumption, require

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}
# What ONNX Runtime says before its reason: which call failed, and the place in its source with the function's types.
_CALL = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : |(?:Load model from|Exception during).*? failed: ?")
_PLACE = re.compile(
    r"\S+\.(?:cc|h|cpp):\d+ (?:(?:[\w:~<>]+ ){0,2}[\w:~<>]+\([^()]*\)(?: const)?(?: \[with [^\]]*\])? )?"
)
_BOUNDS = re.compile(r"\bbounds\b|[Oo]ut of range value in index|invalid ind(?:ex|ice)")
_LONGEST = 300
SILENT = 4  # its errors are raised, too, and said in one line


def session(path: str | os.PathLike[str], threads: int | None = None) -> onnxruntime.InferenceSession:
    """Load an ONNX file on the CPU with every optimisation on.

    Args:
        path: the file.
        threads: threads within a node; None leaves it to ONNX Runtime (one per core).

    Raises:
        InputError: there is no such file, it or its data file is damaged, or this ONNX Runtime is too old for it.
    """
    path, threads = arguments.file_path(path), arguments.threads_of(threads)
    if not path.is_file():
        raise InputError(f"there is no file {path}; export one with ti_fx.export.to_onnx")
    require_intact(path)
    require_data_of(path)
    require_runtime(path, metadata_in(path))
    return session_of(str(path), str(path), threads)


def session_of(
    model: str | bytes, name: str, threads: int | None = None, folder: Path | None = None
) -> onnxruntime.InferenceSession:
    """As :func:`session`, of a path or of the file's content, whose data file is in ``folder``.

    ``name`` is what an error calls it. The data file is not checked.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        loaded = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no base class but Exception
        raise InputError(
            f"ONNX Runtime {onnxruntime.__version__} can't load {name}: {reason_of(error)}; "
            "export the file again if it is damaged"
        ) from error
    _return_memory()
    return loaded


def reason_of(error: Exception) -> str:
    """Return in one line why ONNX Runtime refuses a file or inputs, without the places in its source."""
    text = _PLACE.sub("", _CALL.sub("", " ".join(str(error).split()))).strip(" .")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _return_memory() -> None:
    """Give what was freed back to the system: glibc keeps the codes that were unpacked as the file was loaded."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


class Runtime:
    """An exported model as a function: a dict of arrays or tensors in, a dict of NumPy arrays out.

    >>> Runtime("student.onnx")({"input_ids": ids, "attention_mask": mask})["logits"]  # doctest: +SKIP

    Attributes:
        inputs: what ONNX Runtime says of each input, by name.
        outputs: their names.
        metadata: what the file says of itself (see ``ti_fx.export.file.metadata``).
        largest: the largest size that the model takes of a dynamic dimension, by the dimension's name.
        assumptions: conditions on the dynamic dimensions by which the model decides what it computes.
        checks: what the model refuses by values; those without rows need more than the inputs, and are not made here.
        rows: how many rows the table has that an input of ids looks up, by the input's name.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int | None = None,
        loaded: onnxruntime.InferenceSession | None = None,
    ) -> None:
        """Load a file as :func:`session` does, unless ``loaded`` is a session of it."""
        self.session = session(path, threads) if loaded is None else loaded
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        self.largest: dict[str, int] = value_of(self.metadata, LARGEST, {})
        self.assumptions = tuple(
            Assumption(text, str(line)) for text, line in value_of(self.metadata, ASSUMPTIONS, {}).items()
        )
        self.checks = from_json(value_of(self.metadata, CHECKS, {}))
        self.rows: dict[str, int] = value_of(self.metadata, ROWS, {})

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Run the model.

        Args:
            inputs: one array or tensor per input of the file; other entries that are not arrays are refused, too.

        Raises:
            InputError: a name, dtype or shape is not the file's, the model takes no such size, an id is not in its
                table, or the model refuses such values.
        """
        if not isinstance(inputs, Mapping):
            raise InputError(
                f"the inputs are a {type(inputs).__name__}; give a dict of arrays or tensors by name: "
                f"{', '.join(self.inputs)}"
            )
        if set(inputs) != set(self.inputs):
            raise InputError(
                f"the file takes the inputs {', '.join(self.inputs)}; got {', '.join(map(str, inputs)) or 'none'}"
            )
        feed = {name: self._array(name, value) for name, value in inputs.items()}
        self._check_sizes(feed)
        self._check_ids(feed)
        for check in self.checks:
            check.require({name: torch.from_numpy(array) for name, array in feed.items()})
        try:
            return dict(zip(self.outputs, self.session.run(self.outputs, feed), strict=True))
        except Exception as error:  # ONNX Runtime's errors share no base class but Exception
            reason = reason_of(error)
            if _BOUNDS.search(reason) and "[0,-1]" not in reason:  # that is a table without a row
                raise InputError(
                    f"an input holds an id that is negative or beyond its table ({reason}); give ids that it has"
                ) from error
            raise InputError(
                f"ONNX Runtime can't run these inputs: {reason}; are they longer than the model takes, or empty?"
            ) from error

    def tensors(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Run the model as :meth:`__call__` does, and return tensors."""
        return {name: torch.from_numpy(value) for name, value in self(inputs).items()}

    def _array(self, name: str, value: Any) -> NDArray[Any]:
        try:
            array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        except (ValueError, TypeError, RuntimeError) as error:  # ragged rows, bfloat16, the meta device
            raise InputError(f"input {name!r} can't be made an array: {first_line(error)}") from error
        expected = DTYPES.get(self.inputs[name].type)
        if expected is not None and array.dtype != expected:
            raise InputError(f"input {name!r} is {array.dtype}; the file takes {np.dtype(expected)}")
        return np.ascontiguousarray(array)

    def _check_ids(self, feed: Mapping[str, NDArray[Any]]) -> None:
        """Refuse what ONNX Runtime would count from a table's end, or not find."""
        for name in self.rows.keys() & feed.keys():
            ids, rows = feed[name], self.rows[name]
            if ids.size and not 0 <= ids.min() <= ids.max() < rows:
                place = tuple(map(int, np.argwhere((ids < 0) | (ids >= rows))[0]))
                raise InputError(
                    f"input {name!r} is {ids[place]} at {list(place)}; give ids from 0 to {rows - 1}"
                )

    def _check_sizes(self, feed: Mapping[str, NDArray[Any]]) -> None:
        known: dict[str, tuple[int, str]] = {}
        for name, array in feed.items():
            shape = self.inputs[name].shape
            if array.ndim != len(shape):
                raise InputError(
                    f"input {name!r} has {array.ndim} dimensions; the file takes {len(shape)}: {shape}"
                )
            for index, (size, wanted) in enumerate(zip(array.shape, shape, strict=True)):
                where = f"{name!r} dimension {index}"
                largest = self.largest.get(wanted)
                if largest is not None and size > largest:
                    raise InputError(f"input {where} has size {size}, and the model takes at most {largest}")
                limit, other = (
                    (wanted, "the file")
                    if isinstance(wanted, int)
                    else known.setdefault(wanted, (size, where))
                )
                if size != limit:
                    raise InputError(
                        f"input {where} has size {size}, but {other} has {limit}; they must be equal"
                    )
        require(self.assumptions, {name: size for name, (size, _) in known.items()})
