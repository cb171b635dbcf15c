"""A packed student is written as one ONNX file, which is kept only if ONNX Runtime agrees with PyTorch."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import GraphModule

from ti_fx._version import __version__
from ti_fx.errors import ExportError, InputError, VersionError, first_line
from ti_fx.export import arguments, compare
from ti_fx.export import inputs as io
from ti_fx.export.core_operators import needs_decomposition
from ti_fx.export.file import external_data, names
from ti_fx.export.file.companions import COMPANIONS, Saveable, contents_of, entry_of, require_place
from ti_fx.export.file.content import open_file
from ti_fx.export.file.digests import RECORD_KEY, record_of
from ti_fx.export.file.markers import resolve_markers
from ti_fx.export.file.metadata import metadata_of
from ti_fx.export.file.sizes import tensor_sizes
from ti_fx.export.file.write import SIZE_THRESHOLD, write_model
from ti_fx.export.lowered import lower, opset_for
from ti_fx.export.report import ExportReport
from ti_fx.export.student import require_packed, same_numerics, with_encoding
from ti_fx.files import atomic_files
from ti_fx.find.attention import find_attention
from ti_fx.find.packed import batch_dependent, encoding_of, packed_weights
from ti_fx.frontend.patches import decomposed_where_needed
from ti_fx.ir.edit import mode, tensor
from ti_fx.ir.facts import facts
from ti_fx.numerics.closeness import relative

Example = Mapping[str, Any] | tuple[Any, ...]

_UNFUSED = "unfused"
_PARTS = ("config", "tokenizer", "processor", "generation_config")


def to_onnx(
    gm: GraphModule,
    path: str | os.PathLike[str],
    example: Example,
    *,
    encoding: str | None = None,
    opset: int | None = None,
    requantize: bool = False,
    external_data: bool | None = None,
    size_threshold: int = SIZE_THRESHOLD,
    ram_megabytes: float | None = None,
    config: Saveable | None = None,
    tokenizer: Saveable | None = None,
    processor: Saveable | None = None,
    generation_config: Saveable | None = None,
    dump_dir: str | os.PathLike[str] | None = None,
) -> ExportReport:
    """Write a packed student as ONNX and compare ONNX Runtime with PyTorch; a file that fails is not kept.

    Inputs, outputs and dynamic axes are called what the model calls them. ``gm`` is left as it was. A model above 2 GB
    becomes two files, which belong together: ``student.onnx`` and ``student.onnx.<16 digits>.data``.

    Args:
        gm: a captured graph after ``Strip()`` and ``Pack()``.
        path: the file to write; what was there stays until the new file has passed.
        example: inputs of the graph, any sizes it takes; their values are used in the comparison.
        encoding: None takes the one the student was trained with; one of the same numerics stores it in another way.
        opset: None takes 25, whose INT2 type stores the codes directly (``portable``: 18); 18 to 24 store them as
            bytes, same size.
        requantize: allow another encoding than the trained one; the report says what it costs.
        external_data: True writes large tensors to a data file beside the model, False refuses to; None does it for
            a model above 2 GB, which ONNX can't hold in one file.
        size_threshold: from how many bytes on a tensor goes to the data file, if there is one.
        ram_megabytes: as of :func:`check`: a file whose weights would take more in ONNX Runtime is not run, and only
            its stored tensors are compared; the report says so.
        config: a model configuration, saved beside the file (``config.json``), as are the next three. The file holds
            their digests, and ``pipeline`` takes no others.
        tokenizer: saved beside the file, too (``tokenizer.json``, ...).
        processor: an image processor or feature extractor, saved beside the file (``preprocessor_config.json``).
        generation_config: how a model generates, saved beside the file (``generation_config.json``).
        dump_dir: a folder for the graph's text before and after every pass that lowers it (see :func:`lower`).

    Raises:
        PreconditionError: the graph is not stripped and packed.
        EncodingMismatch: ``encoding`` does not compute what was trained, and ``requantize`` is false.
        InputError: the example does not fit, or the path can't be written, or ``size_threshold`` is negative, or the
            folder has another file's configuration, tokenizer, ..., which the export would replace.
        ExportError: the graph can't be expressed in ONNX.
        ParityError: ONNX Runtime computes something else.
    """
    options = Options(
        encoding,
        opset,
        requantize,
        external_data,
        size_threshold,
        ram_megabytes,
        config,
        (tokenizer, processor, generation_config),
        None if dump_dir is None else Path(dump_dir),
    )
    (report,) = write_files({arguments.file_path(path): (gm, example)}, options)
    return report


@dataclass(frozen=True)
class Options:
    """What :func:`to_onnx` takes beside the graph; ``beside`` is what else is saved beside the files.

    Of several files, each has its graph's texts in a folder of its own in ``dump_dir``.
    """

    encoding: str | None = None
    opset: int | None = None
    requantize: bool = False
    external_data: bool | None = None
    size_threshold: int = SIZE_THRESHOLD
    ram_megabytes: float | None = None
    config: Saveable | None = None
    beside: tuple[Saveable | None, ...] = ()
    dump_dir: Path | None = None


def write_files(files: Mapping[Path, tuple[GraphModule, Example]], options: Options) -> list[ExportReport]:
    """Write graphs that belong together as :func:`to_onnx` writes one: all files, or none if any fails.

    Args:
        files: a packed graph and its example by the path to write; all paths in one folder.
        options: of all.
    """
    for path in files:
        if path.is_dir():
            raise InputError(f"{path} is a folder; give a file name, such as {path / 'student.onnx'}")
    arguments.whole_number("size_threshold", options.size_threshold, 0)
    arguments.megabytes(options.ram_megabytes)
    arguments.switch("requantize", options.requantize)
    arguments.switch("external_data", options.external_data, None)
    for name, part in zip(_PARTS, (options.config, *options.beside), strict=False):
        arguments.saveable(name, part)
    saved = contents_of((options.config, *options.beside))
    require_place(files, saved)
    with ExitStack() as places:
        written = [
            _write(gm, path, example, _own_dumps(options, path, len(files)), entry_of(saved), places)
            for path, (gm, example) in files.items()
        ]
        require_place(files, saved)  # what came there meanwhile
        for name, content in saved.items():
            (written[0].beside / name).write_bytes(content)
    for path, one in zip(files, written, strict=True):
        external_data.remove(one.replaced, unless=external_data.data_file(path))
    sidecars = tuple(path.with_name(name) for name in saved)
    return [replace(one.report, sidecars=(*one.report.sidecars, *sidecars)) for one in written]


def _own_dumps(options: Options, path: Path, files: int) -> Options:
    """Give each of several files a folder of its own for its graph's texts."""
    if options.dump_dir is None or files == 1:
        return options
    return replace(options, dump_dir=options.dump_dir / path.stem)


@dataclass(frozen=True)
class _Written:
    """A file that was written and compared, the folder in which it waits, and the data file that it replaces."""

    report: ExportReport
    beside: Path
    replaced: Path | None


def _write(
    gm: GraphModule, path: Path, example: Example, options: Options, companions: str, places: ExitStack
) -> _Written:
    """Write a file that takes its place when ``places`` is left, and compare it."""
    require_packed(arguments.graph(gm))
    _require_cpu(gm)
    student = with_encoding(gm, options.encoding, options.requantize)
    opset = opset_for(student, options.opset)
    inputs = io.bind(student, example)
    _require_finite(gm, inputs)
    outputs = io.run_graph(student, inputs)
    cost = None
    if not same_numerics(student, gm):
        trained = io.run_graph(gm, inputs)
        cost = {name: relative(value, trained[name]) for name, value in outputs.items()}
    model = onnx_model(student, inputs, opset, options.dump_dir)
    _describe(model, gm, student, opset, options.config, companions)
    beside = places.enter_context(atomic_files(path))
    temporary = beside / path.name
    write_model(model, temporary, options.external_data, options.size_threshold)
    file = open_file(temporary)
    parity = compare.all_of(file, student, inputs, options.ram_megabytes)
    unfused = model.meta.get(_UNFUSED, {})
    sites = find_attention(student)
    shapes = {weight.codes_name: weight.shape for weight in packed_weights(student)}
    return _Written(
        ExportReport(
            path=path,
            bytes=sum(part.stat().st_size for part in beside.iterdir()),
            opset=opset,
            encoding=str(encoding_of(student)),
            tensors=tensor_sizes(file),
            ternary_weights=sum(torch.Size(shape).numel() for shape in shapes.values()),
            parity=parity,
            requantized=cost,
            sidecars=() if file.data is None else (path.with_name(file.data.name),),
            batch_dependent=batch_dependent(student),
            attention_blocks=len(sites),
            unfused={
                site.where: unfused[site.map.name]
                for site in sites
                if site.map is not None and site.map.name in unfused
            },
        ),
        beside,
        external_data.data_file(path),
    )


def _require_cpu(gm: GraphModule) -> None:
    for name, value in [*gm.named_parameters(), *gm.named_buffers()]:
        if value.device.type != "cpu":
            raise ExportError(
                f"{name} is on {value.device}; export from the CPU: move the model there before capture"
            )


def _require_finite(gm: GraphModule, inputs: Mapping[str, Tensor]) -> None:
    """Refuse what nothing can be compared with: NaN, and a ternary weight without a finite scale."""
    for weight in packed_weights(gm):
        if not all(bool(tensor(gm, name).isfinite().all()) for name in weight.names[1:]):
            raise InputError(
                f"weight {weight.parameter} held NaN or infinity when it was packed; mend it before Pack()"
            )
    for kind, values in (("parameter", dict(gm.named_parameters())), ("input", inputs)):
        for name, value in values.items():
            if value.is_floating_point() and bool(value.isnan().any()):
                raise InputError(f"{kind} {name} holds NaN, with which nothing can be compared; mend it")


def onnx_model(
    student: GraphModule, inputs: Mapping[str, Tensor], opset: int, dump_dir: Path | None = None
) -> ir.Model:
    """Lower a packed student and return it as an ONNX model, which is neither named, checked nor written yet."""
    flat, leaves = io.flat_outputs(student)
    lowered = lower(flat, opset, dump_dir=dump_dir)
    dims: dict[str, Any] = {name: found or None for name, found in io.dimensions(student).items()}
    try:
        with mode(lowered, False), _quiet(), decomposed_where_needed(needs_decomposition):
            program = torch.onnx.export(
                lowered,
                (),
                kwargs=io.traceable(student, inputs),
                dynamic_shapes=dims if any(dims.values()) else None,
                output_names=list(leaves),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except VersionError:
        raise
    except Exception as error:  # torch.onnx wraps whatever went wrong in errors of several modules
        reason = first_line(error.__cause__ or error)
        raise ExportError(f"torch.onnx can't export the graph: {reason}") from error
    assert program is not None
    assert program.exported_program is not None
    program.model.meta[_UNFUSED] = facts(lowered).unfused
    _register_constants(program.model.graph)
    names.restore_names(program.model, program.exported_program, lowered, flat)
    return program.model


def _register_constants(graph: ir.Graph) -> None:
    """Store constants that the exporter's optimiser made and forgot to store: the bounds of two Clips in one."""
    for node in graph:
        for value in node.inputs:
            if (
                value is not None
                and value.const_value is not None
                and value.producer() is None
                and value.name not in graph.initializers
            ):
                graph.register_initializer(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch.onnx says about its own parts: torchvision is missing, axes share a name."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _describe(
    model: ir.Model, gm: GraphModule, student: GraphModule, opset: int, config: Any, companions: str
) -> None:
    """Resolve the markers, leave out the exporter's notes (a tenth of the file), and say what the file is."""
    tensors = resolve_markers(model, student)
    stored = {item.initializer for item in tensors}
    _share_equal(model.graph, stored)
    outputs = set(model.graph.outputs)
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outputs:
                value.type, value.shape = None, None
    for value in model.graph.initializers.values():  # what they hold says it, too
        value.metadata_props.clear()
        value.type, value.shape = None, None
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "ti_fx", __version__
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.metadata_props.clear()
    model.metadata_props.update(metadata_of(gm, student, model, tensors, config))
    model.metadata_props[COMPANIONS] = companions
    model.metadata_props[RECORD_KEY] = record_of(model, stored)


def _share_equal(graph: ir.Graph, apart: set[str]) -> None:
    """Store tensors of equal type, shape and bytes once, of any size: the exporter does so up to 1024 values.

    ``apart`` are the packed tensors, which the file's metadata names.
    """
    outputs = set(graph.outputs)
    alike: dict[tuple[Any, ...], list[ir.Value]] = {}
    for name, value in graph.initializers.items():
        if name not in apart and value not in outputs and value.const_value is not None:
            alike.setdefault((value.const_value.dtype, *value.const_value.shape.numpy()), []).append(value)
    for values in alike.values():
        first: dict[bytes, ir.Value] = {}
        for value in values if len(values) > 1 else ():
            assert value.const_value is not None
            assert value.name is not None
            same = first.setdefault(hashlib.sha256(value.const_value.tobytes()).digest(), value)
            if same is not value:
                ir.convenience.replace_all_uses_with(value, same)
                del graph.initializers[value.name]
