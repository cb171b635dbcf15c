"""The command ``ti-fx calibrate`` makes a ternary student from a few hundred unlabelled rows, and trains nothing."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ti_fx.cli import _output as output
from ti_fx.cli._encodings import HELP, METAVAR, chosen_encodings
from ti_fx.cli._row_options import BatchSize, Data, MaxLength, TextColumn
from ti_fx.errors import InputError

if TYPE_CHECKING:
    from ti_fx.analysis import Divergence
    from ti_fx.passes import Calibrate
    from ti_fx.recipe import Recipe

EXAMPLES = """\b
Example:
  ti-fx calibrate ./my-model --data rows.csv --rows 512 --out runs/calibrated
  ti-fx export runs/calibrated --out student.onnx
  ti-fx train ./my-model --start runs/calibrated --recipe runs/calibrated/recipe.json --data train.csv --out runs/on

rows.csv has a header with a text column; labels are not read. For other inputs than texts give input tensors by name,
a row each, as .npz or .safetensors."""

RECIPE, RESULTS = "recipe.json", "results.json"


class WeightsChoice(StrEnum):
    """What ``--weights`` takes."""

    tensor = "tensor"
    row = "row"


class LatentsChoice(StrEnum):
    """What ``--latents`` takes."""

    grid = "grid"
    cell = "cell"


def calibrate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face model folder (or hub name) with its tokenizer, or module:factory.",
            show_default=False,
        ),
    ],
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, recipe and results.", metavar="DIR")],
    rows: Annotated[int, typer.Option(help="Rows that are used.", min=1)] = 512,
    recipe: Annotated[
        str,
        typer.Option(
            help="Whose weights and activations: a preset's name or a recipe file.", metavar="NAME|FILE"
        ),
    ] = "ternarybert",
    weights: Annotated[
        WeightsChoice | None,
        typer.Option(
            help="What shares a scale: a whole weight, or a row of it, which costs 4 bytes a row and is far nearer. "
            "Left out: row, or as the recipe's file has it."
        ),
    ] = None,
    encoding: Annotated[list[str] | None, typer.Option(help=HELP, metavar=METAVAR)] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval", help="Held-out rows, in the same form. Left out: others of --data.", metavar="FILE"
        ),
    ] = None,
    damping: Annotated[
        float | None,
        typer.Option(
            help="How strongly weights are pulled to the model's own: 0.01 to 10. Left out: chosen for each weight on "
            "a fifth of the rows.",
            min=0.0,
        ),
    ] = None,
    latents: Annotated[
        LatentsChoice,
        typer.Option(
            help="Where the weights lie that training starts from: grid, on their ternary values; cell, as near to the "
            "model's as their codes allow."
        ),
    ] = LatentsChoice.grid,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 128,
    seed: Annotated[int, typer.Option(help="Seed of the draw of rows.", min=0)] = 0,
    text_column: TextColumn = None,
) -> None:
    """Make a ternary student from a few hundred rows without labels.

    No gradients: the weights become those ternary ones whose products, on these rows, give what the model gives.
    """
    from ti_fx.analysis import divergence
    from ti_fx.cli._loading import load_source
    from ti_fx.cli._recipe import with_encodings
    from ti_fx.cli._unlabelled import read_rows
    from ti_fx.files import atomic_write
    from ti_fx.frontend.capture import capture
    from ti_fx.ir.pipeline import Pipeline
    from ti_fx.passes import Calibrate
    from ti_fx.recipe import chosen_recipe
    from ti_fx.train.checkpoint import DESCRIPTION
    from ti_fx.train.source import ready_source
    from ti_fx.train.untrained_checkpoint import save_untrained

    chosen = _with_weights(chosen_recipe(recipe), recipe, weights)
    chosen = with_encodings(chosen, chosen_encodings(encoding))
    if (Path(model) / DESCRIPTION).is_file():
        raise InputError(f"{model} is a checkpoint of a student; give the full-precision model")
    if (out / DESCRIPTION).exists():
        raise InputError(f"{out} holds a checkpoint already; choose another --out")
    found = load_source(model)
    if found.note:
        output.say(f"{found.name}: {found.note}")
    source = ready_source(found.model).eval()
    read = read_rows(
        data,
        evaluation,
        source,
        model,
        rows=rows,
        batch_size=batch_size,
        max_length=max_length,
        text_column=text_column,
        seed=seed,
    )
    gm = capture(source, {**found.constants, **read.example})
    chosen.prepare(gm)
    place: Literal["grid", "cell"] = "cell" if latents is LatentsChoice.cell else "grid"
    one = Calibrate(rows=rows, damping=damping, latents=place, data=read.used)
    before = divergence(gm.eval(), read.held_out)
    started = time.perf_counter()
    Pipeline(one)(gm)
    seconds = time.perf_counter() - started
    after = divergence(gm, read.held_out)
    save_untrained(out, gm, chosen, source, example=read.example, tokenizer=read.tokenizer)
    chosen.save(out / RECIPE)
    atomic_write(out / RESULTS, json.dumps(_results(one, before, after, seconds), indent=1) + "\n")
    _show(one, before, after, seconds)
    output.say(f"wrote the checkpoint {out}; next: ti-fx export {out} --out student.onnx")


def _with_weights(recipe: Recipe, written: str, weights: WeightsChoice | None) -> Recipe:
    """Return the recipe with scales that are shared as asked, for a preset a row's."""
    from ti_fx.recipe import PRESETS

    if weights is None and written not in PRESETS:
        return recipe
    shared: Literal["tensor", "row"] = "tensor" if weights is WeightsChoice.tensor else "row"
    return replace(recipe, ternarize=replace(recipe.ternarize, weights=shared))


def _results(one: Calibrate, before: Divergence, after: Divergence, seconds: float) -> dict[str, Any]:
    return {
        "calibrate": str(one),
        "seconds": seconds,
        "measure": before.measure,
        "held_out_rows": before.rows,
        "rounded": before.value,
        "calibrated": after.value,
        "weights": [asdict(row) for row in one.report],
    }


def _show(one: Calibrate, before: Divergence, after: Divergence, seconds: float) -> None:
    """Print a row a weight, what was left, and what came of it on held-out rows."""
    columns = ("weight", "rows", "error", "after", "codes changed", "zeros", "seconds", "")
    cells = [
        (
            row.name,
            row.rows,
            f"{row.before:.4f}",
            f"{row.after:.4f}",
            f"{row.changed:.0%}",
            f"{row.zeros:.0%}",
            row.seconds,
            row.note,
        )
        for row in one.report
        if row.rows
    ]
    output.table(columns, cells)
    for row in one.report:
        if not row.rows:
            output.say(str(row))
    output.say(f"on {before.rows:,} held-out rows, to the full-precision model:")
    output.say(f"  rounded     {before}")
    output.say(f"  calibrated  {after}; {seconds:.0f} s")
