"""The options by which a command takes rows without labels; :mod:`ti_fx.cli._unlabelled` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    Path,
    typer.Option(
        help="Rows without labels: .csv or .tsv with a header, .json or .jsonl; or .npz, .safetensors.",
        metavar="FILE",
    ),
]
BatchSize = Annotated[int, typer.Option(help="Rows a batch.", min=1)]
MaxLength = Annotated[int, typer.Option(help="Tokens at which a text is cut.", min=3)]
TextColumn = Annotated[
    str | None, typer.Option(help="Left out: text, sentence, question or content.", metavar="NAME")
]
