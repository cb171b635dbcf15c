"""The command ``ti-fx bench`` times exported files, and the model that they came from, on this machine."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ti_fx.cli import _output as output
from ti_fx.errors import InputError

if TYPE_CHECKING:
    from ti_fx.measure.bench import Bench

EXAMPLES = """\b
Examples:
  ti-fx bench student.onnx --against ./my-classifier --threads 1
  ti-fx bench student.onnx other.onnx --batch 1 --batch 8 --length 128 --length 512
  ti-fx bench llama.onnx --against ./my-llama --batch 1 --length 256

For a file with a cache, it times one more token after --length tokens."""

FP32, INT8 = "fp32", "ORT int8"


def bench(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE.onnx...",
            help="Files of one model, by ti_fx or anyone; the first one says what is fed.",
            show_default=False,
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            help="The original model, as for ti-fx inspect: its fp32 export by torch.onnx and ONNX Runtime's own "
            "dynamic int8 of that take part.",
            metavar="MODEL",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Rows of one run; may be repeated. Left out: 1, 8.", metavar="N")
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of a row; may be repeated. Left out: 128.", metavar="N"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads; left out: one per core.", min=1, metavar="N")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each at each size; the median counts.", min=1)] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead.")] = False,
) -> None:
    """Time exported files in ONNX Runtime, beside the original model.

    The files run in turn; told, too, is what each takes to load, of memory and on disk.
    """
    from tempfile import TemporaryDirectory

    from ti_fx.measure.bench import bench as measure

    for option, sizes in (("--batch", batch), ("--length", length)):
        if sizes is not None and min(sizes) < 1:
            raise InputError(f"{option} is {min(sizes)}; give 1 or more")
    labels = {str(path): path for path in files}
    remarks: list[str] = []
    with TemporaryDirectory() if against is not None else nullcontext("") as folder:
        if against is not None:
            labels |= _originals(against, files[0], Path(folder), remarks)
        found = measure(
            labels,
            batches=batch or (1, 8),
            lengths=length or (128,),
            threads=threads,
            rounds=rounds,
        )
    if as_json:
        print(json.dumps({**asdict(found), "remarks": remarks}, indent=1))
    else:
        for remark in remarks:
            output.say(remark)
        _show(found)


def _originals(source: str, file: Path, folder: Path, remarks: list[str]) -> dict[str, Path]:
    """Export the original model as the file is, with or without a cache, and quantise that; add what to say of it."""
    from ti_fx.cli._loading import load_source
    from ti_fx.export.cached.causal import is_encoder_decoder
    from ti_fx.export.cached.names import CROSS_KEY, cached_layers
    from ti_fx.export.run.session import session
    from ti_fx.measure import baselines

    of_file = session(file)
    has_cache = cached_layers([value.name for value in of_file.get_inputs()]) > 0
    is_encoder = CROSS_KEY.format(0) in [value.name for value in of_file.get_outputs()]
    found = load_source(source)
    if found.note:
        remarks.append(f"{found.name}: {found.note}")
    model: Any = found.model.float()
    if is_encoder_decoder(model) and (has_cache or is_encoder):
        raise InputError(
            "--against takes encoders and causal models; of an encoder-decoder's two files, compare with files of "
            "your own"
        )
    if not isinstance(found.example, dict):
        raise InputError(
            f"--against needs a model whose example is a dict of keyword tensors; {source} has none"
        )
    if hasattr(model, "set_attn_implementation"):
        try:
            model.set_attn_implementation("sdpa")
        except ValueError as error:
            remarks.append(f"fp32 with the model's own attention: {error}")
    paths = {FP32: folder / "fp32.onnx", INT8: folder / "int8.onnx"}
    write = baselines.export_fp32_with_cache if has_cache else baselines.export_fp32
    write(model, paths[FP32], found.example)
    baselines.export_dynamic_int8(paths[FP32], paths[INT8])
    return paths


def _show(found: Bench) -> None:
    first = next(iter(found.bytes))
    base = FP32 if FP32 in found.bytes else first
    output.table(
        ("file", "MB", "load, ms", "RAM, MB"),
        [
            (label, size / 1e6, found.footprints[label].load_milliseconds, found.footprints[label].megabytes)
            for label, size in found.bytes.items()
        ],
        "In a fresh process each",
    )
    rows = [
        (
            row.batch,
            row.length,
            label,
            taken,
            *((1e3 * row.batch / taken,) if found.decodes else ()),
            row.milliseconds[base] / taken,
        )
        for row in found.times
        for label, taken in row.milliseconds.items()
    ]
    tokens = ("tokens/s",) if found.decodes else ()
    title = "One token after as many in the cache" if found.decodes else "One run"
    output.table(
        ("batch", "in the cache" if found.decodes else "length", "file", "ms", *tokens, f"over {base}"),
        rows,
        title,
    )
