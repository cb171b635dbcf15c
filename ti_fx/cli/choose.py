"""The command ``ti-fx choose`` measures a model's encodings on this machine and names the one to train for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ti_fx.cli import _output as output
from ti_fx.errors import InputError

if TYPE_CHECKING:
    from torch.fx import GraphModule

EXAMPLES = """\b
Examples:
  ti-fx choose ./my-bert --batch 8 --length 128
  ti-fx choose ./my-gpt2 --batch 1 --length 1 --ram 100 --threads 1

Then train for it:  ti-fx train ./my-bert --encoding NAME ..."""

_DEFAULTS = {"batch": 1, "sequence": 128}
_OPTIONS = {"batch": "--batch", "sequence": "--length"}


def choose(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model that is not ternary yet, as for ti-fx inspect; its values don't matter, its sizes do.",
            show_default=False,
        ),
    ],
    batch: Annotated[
        int | None, typer.Option(help="Rows of one run; left out: 1.", min=1, metavar="N")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens of a row; left out: 128, or what the model takes.", min=1, metavar="N"),
    ] = None,
    ram: Annotated[
        float | None, typer.Option(help="The most memory that loading and one run may take.", metavar="MB")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads; left out: one per core.", min=1, metavar="N")
    ] = None,
    encoding: Annotated[
        list[str] | None,
        typer.Option(
            help="One to measure; may be repeated. Left out: int8-tensor, int8-token, nbits2.", metavar="NAME"
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each; the median counts.", min=1)] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead.")] = False,
) -> None:
    """Measure a model's encodings and say which one to train for.

    They run in ONNX Runtime, in turn, and the reason is given.
    """
    from ti_fx import capture
    from ti_fx.cli._loading import load_source
    from ti_fx.export import inputs as io
    from ti_fx.measure import choose_encoding
    from ti_fx.measure.choose import CANDIDATES

    found = load_source(model)
    gm = capture(found.model.float().eval(), found.example)
    example = io.bind(gm, found.example)
    inputs = io.resized(gm, example, _sizes(gm, {"batch": batch, "sequence": length}))
    choice = choose_encoding(
        gm,
        inputs,
        candidates=encoding or CANDIDATES,
        ram_megabytes=ram,
        threads=threads,
        rounds=rounds,
    )
    if as_json:
        print(json.dumps(asdict(choice), indent=1))
        return
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
    output.say(f"{found.name}, on {shapes}" + (f" ({found.note})" if found.note else ""))
    output.say(str(choice))


def _sizes(gm: GraphModule, asked: Mapping[str, int | None]) -> dict[str, int]:
    """Return the sizes of the dynamic dimensions: as asked, else the defaults, as far as the model takes them.

    Raises:
        InputError: a size was asked for that the model does not take, or does not let change.
    """
    from ti_fx.export.inputs import limits

    known, wanted = limits(gm), {}
    for name, size in asked.items():
        if name not in known:
            if size is not None:
                raise InputError(f"the model has no dynamic {name}; leave {_OPTIONS[name]} out")
            continue
        largest = known[name][1]
        if size is not None and largest is not None and size > largest:
            raise InputError(f"{_OPTIONS[name]} is {size}, and the model takes at most {largest}")
        wanted[name] = size or min(_DEFAULTS[name], largest or _DEFAULTS[name])
    return wanted
