"""``ti-fx export``: a trained student becomes an ONNX file with packed ternary weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ti_fx.cli import _output as output
from ti_fx.errors import InputError

_EXAMPLES = """[bold]Examples[/bold]

  ti-fx export runs/ti-g --out student.onnx
  ti-fx export runs/ti-g --out student.onnx --encoding int8-token --requantize
  ti-fx export runs/digits --out digits.onnx --source mypackage.models:make_model
  ti-fx export ./my-bert --out untrained.onnx --ternarize"""


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A folder that ti-fx train or TernaryTrainer wrote; with --ternarize, a model, as for ti-fx inspect.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The .onnx file; config and tokenizer go beside it.", metavar="FILE")
    ],
    encoding: Annotated[
        str | None,
        typer.Option(
            help="How activations are quantised: int8-tensor, int8-token, reference or float; left out: as trained.",
            metavar="NAME",
        ),
    ] = None,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize", help="Allow another encoding than the trained one; reports what it costs."
        ),
    ] = False,
    opset: Annotated[
        int | None, typer.Option(help="ONNX opset, 18 to 25; below 25 for older runtimes. Left out: 25.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="The source model (folder or module:factory), where the checkpoint is not of a Hugging Face model.",
            metavar="MODEL",
        ),
    ] = None,
    ternarize: Annotated[
        bool,
        typer.Option("--ternarize", help="CHECKPOINT is a plain model: make it ternary without training."),
    ] = False,
) -> None:
    """Write a student as ONNX with packed ternary weights, and compare ONNX Runtime with PyTorch."""
    if out.suffix != ".onnx":
        raise InputError(f"--out is {out}; give a file name that ends in .onnx")
    if out.is_dir():
        raise InputError(f"--out is {out}, a folder; give a file name in it, such as {out / 'student.onnx'}")
    if requantize and encoding is None:
        raise InputError("--requantize needs --encoding, the one to change to")
    from ti_fx.cli._student import packed_student, saved_parts
    from ti_fx.encodings import get_encoding
    from ti_fx.export import to_onnx

    if encoding is not None:
        get_encoding(encoding)
    student = packed_student(checkpoint, model=source, ternarize=ternarize, encoding=encoding)
    config, tokenizer = saved_parts(student.folder)
    report = to_onnx(
        student.graph,
        out,
        student.example,
        encoding=encoding,
        opset=opset,
        requantize=requantize,
        config=config,
        tokenizer=tokenizer,
    )
    output.say(str(report))


export.__doc__ = f"{export.__doc__}\n\n{_EXAMPLES}"
