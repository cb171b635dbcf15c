"""The command ``ti-fx check`` compares an exported file with the checkpoint that it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ti_fx.cli import _output as output
from ti_fx.cli._encodings import Encodings
from ti_fx.errors import InputError

EXAMPLES = """\b
Examples:
  ti-fx check student.onnx runs/ti-g
  ti-fx check untrained.onnx ./my-bert --ternarize

Exit code 0: equal; 1: the file computes something else; 2: bad input."""


def check(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.onnx", help="A file that ti-fx export wrote.", show_default=False)
    ],
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT", help="The checkpoint it came from, as for export.", show_default=False
        ),
    ],
    source: Annotated[
        str | None, typer.Option(help="The checkpoint's source model, as for export.", metavar="MODEL")
    ] = None,
    ternarize: Annotated[
        bool, typer.Option("--ternarize", help="CHECKPOINT is a plain model, made ternary without training.")
    ] = False,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="Read its weights one at a time, as for export.")
    ] = False,
    ram_megabytes: Annotated[
        float | None, typer.Option(help="Don't run a file that would take more, as for export.", metavar="MB")
    ] = None,
) -> None:
    """Compare an exported file with the checkpoint that it came from.

    Compared are the stored weights, each node, and the outputs of ONNX Runtime with PyTorch's.
    """
    from ti_fx import export
    from ti_fx.cli._student import Part, packed_student
    from ti_fx.export.cached.names import CROSS_KEY, cached_layers
    from ti_fx.export.file.content import open_file
    from ti_fx.export.file.metadata import KEPT, value_of
    from ti_fx.numerics.encodings import Kept

    content = open_file(file)
    trained = content.requantized_from or content.encoding
    kept: Kept = "float16" if "float16" in value_of(content.metadata, KEPT, {}) else "float32"
    cross = CROSS_KEY.format(0)
    part: Part = "decoder" if cross in content.inputs else "encoder" if cross in content.outputs else ""
    has_cache = bool(part) or cached_layers(content.inputs) > 0
    parts = packed_student(
        checkpoint,
        model=source,
        ternarize=ternarize,
        encodings=Encodings(trained.name, dict(trained.others)),
        kept=kept,
        cache=has_cache,
        logits_to_keep=int(has_cache and not part and content.outputs["logits"][1] == 1),
        low_memory=low_memory,
    )
    if part not in parts:
        raise InputError(
            f"{file} is the {part} of an encoder-decoder, and {checkpoint} is none; check it with its own"
        )
    student = parts[part]
    report = export.check(file, student.graph, student.example, ram_megabytes=ram_megabytes)
    output.say(f"{file}: ONNX Runtime against PyTorch")
    output.say(str(report))
