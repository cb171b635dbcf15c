"""The command ``ti-fx export`` writes a trained student as an ONNX file with packed ternary weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from ti_fx.cli import _output as output
from ti_fx.cli._encodings import HELP, METAVAR, chosen_encodings
from ti_fx.cli._lowering import printed_after, require_pass
from ti_fx.errors import InputError

EXAMPLES = """\b
Examples:
  ti-fx export runs/ti-g --out student.onnx
  ti-fx export runs/ti-g --out small.onnx --encoding base3
  ti-fx export runs/ti-g --out student.onnx --encoding int8-token --requantize
  ti-fx export runs/ti-g --out student.onnx --print-after fuse-attention
  ti-fx export runs/digits --out digits.onnx --source mypackage.models:make_model
  ti-fx export ./my-bert --out untrained.onnx --ternarize
  ti-fx export ./my-t5 --out t5.onnx --ternarize --cache --encoding int8-token
  ti-fx export ./Llama-2-7b --out llama.onnx --ternarize --cache --encoding nbits2 --low-memory
  ti-fx export ./my-gpt2 --out untrained.onnx --ternarize --cache --encoding int8-token --encoding "*.wte=nbits2"

What is saved beside the model's weights (configuration, tokenizer, image processor) goes beside the file."""


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
        list[str] | None,
        typer.Option(
            help=f"{HELP} Left out: as trained. What was trained is exported in an encoding that computes the same.",
            metavar=METAVAR,
        ),
    ] = None,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize", help="Allow another encoding than the trained one; reports what it costs."
        ),
    ] = False,
    kept: Annotated[
        Literal["float32", "float16"] | None,
        typer.Option(
            help="How what is not ternary is stored: biases, norms, position tables, heads. Left out: float32, of "
            "base3 float16.",
            show_default=False,
        ),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option(
            help="ONNX opset, 18 to 25; below 25 for older runtimes. Left out: 25, of portable 18.",
            metavar="N",
        ),
    ] = None,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache",
            help="Keys and values go in and out, so that a language model generates from the file. An encoder-decoder "
            "becomes two: FILE-encoder.onnx and FILE-decoder.onnx.",
        ),
    ] = False,
    logits_to_keep: Annotated[
        int,
        typer.Option(
            help="With --cache, of a causal model: 1 gives the last token's logits alone, all that generating needs of "
            "a prompt; 0 those of every token.",
            metavar="N",
        ),
    ] = 0,
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
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory",
            help="With --ternarize: read the weights one at a time from the folder's safetensors, for a model that "
            "does not fit into memory.",
        ),
    ] = False,
    external_data: Annotated[
        bool | None,
        typer.Option(
            "--external-data/--no-external-data",
            help="Write large tensors to a data file beside the model, or refuse to. Left out: above 2 GB.",
            show_default=False,
        ),
    ] = None,
    ram_megabytes: Annotated[
        float | None,
        typer.Option(
            help="Don't run a file whose weights would take more in ONNX Runtime; compare stored tensors alone.",
            metavar="MB",
        ),
    ] = None,
    print_after: Annotated[
        str | None,
        typer.Option(
            help="Print the graph's text after this pass of those that lower it; all: after each. An unknown name "
            "lists near ones.",
            metavar="PASS",
        ),
    ] = None,
) -> None:
    """Write a student as ONNX with packed ternary weights.

    The file is run in ONNX Runtime and compared with PyTorch.
    """
    if out.suffix != ".onnx":
        raise InputError(f"--out is {out}; give a file name that ends in .onnx")
    if out.is_dir():
        raise InputError(f"--out is {out}, a folder; give a file name in it, such as {out / 'student.onnx'}")
    if requantize and encoding is None:
        raise InputError("--requantize needs --encoding, the one to change to")
    chosen = chosen_encodings(encoding)
    if chosen.others and not ternarize:
        raise InputError(
            "a checkpoint has the encodings that its weights were trained with; give GLOB=NAME to ti-fx train"
        )
    if print_after is not None:
        require_pass(print_after)
    from ti_fx.cli._student import PARTS, packed_student, saved_parts
    from ti_fx.export.file.companions import contents_of, require_place
    from ti_fx.export.writer import Options, write_files

    places = {part: out.with_name(f"{out.stem}-{part}.onnx") if part else out for part in PARTS}
    # before anything is computed; a name on the hub has a folder only later
    require_place(places.values(), contents_of(saved_parts(Path(checkpoint)).values()))
    parts = packed_student(
        checkpoint,
        model=source,
        ternarize=ternarize,
        encodings=chosen,
        kept=kept,
        cache=cache,
        logits_to_keep=logits_to_keep,
        low_memory=low_memory,
    )
    saved = saved_parts(next(iter(parts.values())).folder)
    options = Options(
        encoding=None if ternarize else chosen.name,
        opset=opset,
        requantize=requantize,
        external_data=external_data,
        ram_megabytes=ram_megabytes,
        config=saved.pop("config", None),
        beside=tuple(saved.values()),
    )
    files = {places[part]: (student.graph, student.example) for part, student in parts.items()}
    with printed_after(print_after) as dump_dir:
        reports = write_files(files, replace(options, dump_dir=dump_dir))
    for report in reports:
        output.say(str(report))
