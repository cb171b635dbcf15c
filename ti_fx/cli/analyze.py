"""The command ``ti-fx analyze`` shows where a ternary student loses what its teacher knows."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ti_fx.cli import _output as output
from ti_fx.cli._row_options import BatchSize, Data, MaxLength, TextColumn

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from ti_fx.view.report import Section

EXAMPLES = """\b
Examples:
  ti-fx analyze ./my-model --data rows.csv
  ti-fx analyze ./my-model --student runs/mine --data rows.csv --what layers --what hessian --html analysis.html
  ti-fx analyze ./my-model --recipe ti-g --data inputs.npz --what sensitivity --json

The student is the model rounded by the recipe, or that of a checkpoint. rows.csv has a header with a text column; for
other inputs than texts give input tensors by name, a row each, as .npz or .safetensors."""


class What(StrEnum):
    """What ``--what`` takes."""

    layers = "layers"
    maps = "maps"
    sensitivity = "sensitivity"
    hessian = "hessian"
    surface = "surface"


DEFAULT = (What.layers, What.maps, What.sensitivity)
_EIGENVALUES = 5


def analyze(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The full-precision model: a Hugging Face folder (or hub name), or module:factory.",
            show_default=False,
        ),
    ],
    data: Data,
    student: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint of ti-fx train or calibrate; left out: MODEL, rounded.", metavar="DIR"
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A preset's name or a recipe file; left out: the checkpoint's, or ternarybert.",
            metavar="NAME|FILE",
        ),
    ] = None,
    what: Annotated[
        list[What] | None,
        typer.Option(
            help="layers: error at every point. maps: how far attention orders tokens otherwise. sensitivity: what "
            "each weight costs that alone is ternary. hessian: the loss's largest eigenvalues. surface: the loss "
            "around the weights. May be repeated; left out: the first three."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows that are used.", min=2)] = 32,
    batch_size: BatchSize = 32,
    max_length: MaxLength = 128,
    seed: Annotated[int, typer.Option(help="Seed of the draw of rows and of directions.", min=0)] = 0,
    text_column: TextColumn = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with charts.", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure where a student differs from its teacher.

    Error at every point of every layer, the order within attention maps, what each weight costs alone, and the loss's
    curvature and surface.
    """
    from ti_fx.cli._unlabelled import read_rows

    gm, source = _prepared(model, student, recipe)
    read = read_rows(
        data,
        None,
        source,
        model,
        rows=rows,
        batch_size=batch_size,
        max_length=max_length,
        text_column=text_column,
        seed=seed,
        alone=True,
    )
    made = gm(read.example)
    found: dict[str, Any] = {"model": model, "student": str(student or "rounded"), "rows": rows}
    sections: list[Section] = []
    for one in what or DEFAULT:
        values, section = _MEASURES[one](made, read.used, seed)
        found[one.value] = values
        sections.append(section)
    if html is not None:
        from ti_fx.view.report import Report, environment, write_report

        title = f"{model} and its student, {student or 'rounded'}"
        write_report(Report("ti_fx analyze", [*sections, environment({"seed": str(seed)})], title), html)
    if as_json:
        output.say(json.dumps(found, indent=1))
        return
    for section in sections:
        _print(section)
    if html is not None:
        output.say(f"wrote {html}")


def _prepared(model: str, student: Path | None, recipe: str | None) -> tuple[Any, Any]:
    """Return what makes the prepared graph for an example, and the teacher."""
    from ti_fx.cli._loading import load_source
    from ti_fx.cli._start import require_teacher
    from ti_fx.frontend.capture import capture
    from ti_fx.recipe import Recipe, chosen_recipe
    from ti_fx.train.checkpoint import read_facts, read_weights
    from ti_fx.train.source import ready_source

    require_teacher(model)
    facts = None
    if student is not None:
        facts = read_facts(student)
        read_weights(student, facts)
    if recipe is not None or facts is None:
        chosen = chosen_recipe(recipe or "ternarybert")
    else:
        chosen = Recipe.from_dict(facts["recipe"], where=str(student))
    found = load_source(model)
    teacher = ready_source(found.model).eval()
    own = teacher if student is None else ready_source(load_source(str(student)).model).eval()

    def make(example: dict[str, Any]) -> GraphModule:
        gm = capture(own, {**found.constants, **example})
        chosen.prepare(gm, teacher=None if own is teacher else teacher)
        return gm.eval()

    return make, teacher


def _layers(gm: GraphModule, batches: list[Any], seed: int) -> tuple[Any, Section]:
    from ti_fx.analysis import layer_errors
    from ti_fx.view.report import BarChart

    tokens = batches[0].get("attention_mask")
    errors = layer_errors(gm, batches[0], tokens=tokens if tokens is not None and tokens.dim() == 2 else None)
    places = list(dict.fromkeys((row.stack, row.layer) for row in errors))
    points = list(dict.fromkeys((row.kind, row.point) for row in errors))
    by_place = {(row.stack, row.layer, row.kind, row.point): row.relative_error for row in errors}
    series = {
        point if kind in ("self", "layer") else f"{point} ({kind})": [
            by_place.get((*place, kind, point), float("nan")) for place in places
        ]
        for kind, point in points
    }
    labels = [f"{stack}.{layer}" for stack, layer in places]
    note = "‖student - teacher‖ / ‖teacher‖ on the first batch."
    section = BarChart("Error by layer", labels, series, "stack.layer", "relative error", note)
    return [asdict(row) for row in errors], section


def _maps(gm: GraphModule, batches: list[Any], seed: int) -> tuple[Any, Section]:
    from ti_fx.analysis import map_ranking
    from ti_fx.view.report import Table

    tokens = batches[0].get("attention_mask")
    found = map_ranking(gm, batches[0], tokens=tokens if tokens is not None and tokens.dim() == 2 else None)
    rows: list[list[str | int | float | None]] = [
        [f"stack {row.stack}, layer {row.layer} ({row.kind})", row.head, row.loss] for row in found
    ]
    note = "0: every query puts the keys in the teacher's order."
    return [asdict(row) for row in found], Table(
        "Ranking loss of maps", ("block", "head", "loss"), rows, note
    )


def _sensitivity(gm: GraphModule, batches: list[Any], seed: int) -> tuple[Any, Section]:
    from ti_fx.analysis import sensitivity
    from ti_fx.view.report import Table

    found = sorted(sensitivity(gm, batches), key=lambda row: -row.cost)
    rows = [[row.weights[0], f"{row.cost:.3g}"] for row in found]
    note = "Divergence of the outputs where this weight alone is ternary, activations in full precision."
    return [asdict(row) for row in found], Table("Cost of each weight alone", ("weight", "cost"), rows, note)


def _hessian(gm: GraphModule, batches: list[Any], seed: int) -> tuple[Any, Section]:
    from ti_fx.analysis import HessianProducts, top_eigenvalues
    from ti_fx.view.report import Table

    products = HessianProducts(gm, batches[0])
    count = min(_EIGENVALUES, products.size)
    values = top_eigenvalues(products, count, seed=seed)
    rows = [[f"{place}", f"{value:.4g}"] for place, value in enumerate(values, start=1)]
    note = f"Of the recipe's loss on the first batch, in {products.size:,} weights."
    return values, Table("Largest eigenvalues of the Hessian", ("", "eigenvalue"), rows, note)


def _surface(gm: GraphModule, batches: list[Any], seed: int) -> tuple[Any, Section]:
    from ti_fx.analysis import loss_surface
    from ti_fx.view.report import LineChart

    found = loss_surface(gm, batches[:1], steps=7, span=0.5, seed=seed)
    series = {
        f"y = {y:.2g}": (list(found.offsets), [row[index] for row in found.losses])
        for index, y in enumerate(found.offsets)
    }
    note = "The recipe's loss at weights + x · first + y · second direction, each as long as the weights themselves."
    return asdict(found), LineChart("Loss around the weights", series, "x", "loss", note)


_MEASURES = {
    What.layers: _layers,
    What.maps: _maps,
    What.sensitivity: _sensitivity,
    What.hessian: _hessian,
    What.surface: _surface,
}


def _print(section: Any) -> None:
    """Print a section as a table."""
    if section.kind == "table":
        output.table(section.columns, section.rows, section.title)
    elif section.kind == "bar-chart":
        cells = [
            [label, *(f"{values[index]:.4f}" for values in section.series.values())]
            for index, label in enumerate(section.labels)
        ]
        output.table((section.x_label, *section.series), cells, section.title)
    else:
        x = next(iter(section.series.values()))[0]
        cells = [
            [f"{value:g}", *(f"{y[index]:.4g}" for _, y in section.series.values())]
            for index, value in enumerate(x)
        ]
        output.table((section.x_label, *section.series), cells, section.title)
    if section.note:
        output.say(section.note)
