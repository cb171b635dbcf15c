"""``all_of`` compares a file with its graph: what is stored, what each node computes, what comes out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ti_fx.errors import EncodingMismatch, ParityError
from ti_fx.export import arguments
from ti_fx.export import inputs as io
from ti_fx.export.compare.constants import compare_constants
from ti_fx.export.compare.digests import compare_digests
from ti_fx.export.compare.nodes import compare_nodes
from ti_fx.export.compare.outputs import compare_outputs, tolerance_text
from ti_fx.export.compare.packed_tensors import compare_tensors
from ti_fx.export.file.content import FileContent, open_file
from ti_fx.export.file.minimum_runtime import require_runtime
from ti_fx.export.report import ParityReport
from ti_fx.export.student import as_written, require_packed
from ti_fx.find.packed import encoding_of, is_quantised, looked_up, packed_weights, weight_quantisers
from ti_fx.ir.edit import tensor
from ti_fx.ir.inputs import require_inputs


def check(
    path: str | os.PathLike[str],
    gm: GraphModule,
    example: Mapping[str, Any] | tuple[Any, ...],
    ram_megabytes: float | None = None,
) -> ParityReport:
    """Check an exported file against the packed graph it came from: stored tensors byte by byte, outputs by running it.

    Args:
        path: a file written by ``to_onnx``.
        gm: the packed graph.
        example: inputs of the graph, any sizes it takes.
        ram_megabytes: the most memory that the weights may take in ONNX Runtime, by estimate; if they would take more,
            the file is not run, and the report says so. None runs it.

    Raises:
        InputError: the file is missing, damaged, or not by ti_fx; the example does not fit the graph.
        PreconditionError: the graph is not packed.
        EncodingMismatch: the file has another encoding.
        ParityError: stored tensors or outputs differ.
    """
    require_packed(arguments.graph(gm))
    path, ram_megabytes = arguments.file_path(path), arguments.megabytes(ram_megabytes)
    file = open_file(path)
    student = as_written(gm, file.encoding, file.requantized_from)
    if student is None:
        raise EncodingMismatch(
            f"{path} has encoding '{file.encoding}', and the graph '{encoding_of(gm)}'; "
            "check it with the graph it came from"
        )
    return all_of(file, student, example, ram_megabytes)


def all_of(
    file: FileContent,
    student: GraphModule,
    example: Mapping[str, Any] | tuple[Any, ...],
    ram_megabytes: float | None = None,
) -> ParityReport:
    """Compare a file with a graph of the same encoding: stored tensors, digests, each node, and outputs at other sizes.

    Arguments and errors are those of :func:`check`.
    """
    require_runtime(file.path, file.metadata)
    count = compare_tensors(file, student) + compare_constants(file, student)
    compare_digests(file, student)
    bound = io.bind(student, example)
    require_inputs(student, (), bound)
    needed = runtime_megabytes(student)
    if ram_megabytes is not None and needed > ram_megabytes:
        why = (
            f"the weights take about {needed:,.0f} MB in ONNX Runtime, and ram_megabytes is {ram_megabytes:g}"
        )
        return ParityReport((), "stored tensors alone were compared", count, skipped=(f"any size: {why}",))
    single = compare_nodes(file, student, _with_padding(student, bound))
    exact = not is_quantised(student)
    outputs = compare_outputs(file, student, bound, exact)
    if outputs.failure is not None:
        compare_nodes(file, student, outputs.failure.inputs)  # names the node, if one differs at these sizes
        raise ParityError(outputs.failure.text) from outputs.failure.cause
    for inputs in outputs.unsteady:
        compare_nodes(file, student, inputs)
    return ParityReport(outputs.rows, tolerance_text(exact), count, single, outputs.skipped)


def _with_padding(student: GraphModule, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs on which a mask shows: with padding, if they have none and the model takes it."""
    padded = io.padded(student, inputs)
    if "attention_mask" not in inputs or not bool(inputs["attention_mask"].all()):
        return inputs
    try:
        io.run_graph(student, padded)
    except ValueError:  # as many image tokens as the images have patches
        return inputs
    return padded


def runtime_megabytes(student: GraphModule) -> float:
    """Estimate the memory that the weights take in ONNX Runtime: once as stored, once as its operators read them.

    Those read two bits by blocks and from tables, a byte in other products of quantised activations, else floats twice.
    """
    tables = {table.codes_name for node in student.graph.nodes if (table := looked_up(node)) is not None}
    quantisers = weight_quantisers(student)
    weights = {weight.codes_name: weight for weight in packed_weights(student)}
    total = 0.0
    for name, weight in weights.items():
        quantiser = quantisers[weight.parameter]
        blocks, integers = (quantiser.block, quantiser.codes) if quantiser else (0, None)
        each = 0.25 if name in tables or blocks else 1.0 if integers else 8.0
        total += (0.25 + each) * torch.Size(weight.shape).numel()
    stored = {str(node.target) for node in student.graph.find_nodes(op="get_attr")} - weights.keys()
    for value in (tensor(student, name) for name in stored):
        total += value.nbytes + value.numel() * max(
            value.element_size(), 4
        )  # half precision is read as float32
    return total / 1e6
