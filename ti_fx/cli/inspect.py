"""The command ``ti-fx inspect`` shows a model's blocks, what would become ternary, and what each pass changes."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ti_fx.cli import _output as output
from ti_fx.errors import InputError

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from ti_fx.analysis import StoredWeight
    from ti_fx.cli._loading import Loaded
    from ti_fx.ir.facts import CaptureReport
    from ti_fx.ir.pipeline import Pass
    from ti_fx.recipe import Recipe
    from ti_fx.view import Step

EXAMPLES = """\b
Examples:
  ti-fx inspect ./my-bert
  ti-fx inspect google/vit-base-patch16-224
  ti-fx inspect ./a-large-model --meta
  ti-fx inspect mypackage.models:make_model --recipe ti-g
  ti-fx inspect ./my-bert --diff "ternarize{weights=row}"
  ti-fx inspect ./my-bert --diff "intervene{at=map}" --svg map.svg --layer 2
  ti-fx inspect ./my-bert --recipe ti-g --html graph.html
  ti-fx inspect ./my-bert --recipe ti-g --ask trained
  ti-fx inspect student.onnx --json

An option's value with braces needs quotes in a shell."""

_LISTED = 20


class Question(StrEnum):
    """What ``--ask`` takes; the names of ``ti_fx.view.QUESTIONS``."""

    output_without_loss = "output-without-loss"
    teacher_cone = "teacher-cone"
    trained = "trained"


def _list_passes(wanted: bool) -> None:
    """Print every pass with the first line of its docstring and the module that it comes from."""
    if not wanted:
        return
    from ti_fx.ir.pipeline import Pass
    from ti_fx.recipe import Recipe  # noqa: F401  (every pass of a recipe is imported with it)

    rows = [
        (name, cleandoc(kind.__doc__ or "").partition("\n")[0], kind.__module__)
        for name, kind in sorted(Pass.known().items())
    ]
    output.table(("pass", "what it does", "module"), rows)
    raise typer.Exit


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face model folder, a name on its hub, a ti_fx checkpoint, an .onnx file, or module:factory "
            "(also path/file.py:factory), where factory() returns a model, or (model, example) with example a dict "
            "of keyword tensors.",
            show_default=False,
        ),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Prepare the graph by a recipe first: a preset's name (ti-g, ternarybert, ...) or a file.",
            metavar="NAME|FILE",
        ),
    ] = None,
    diff: Annotated[
        list[str] | None,
        typer.Option(
            help="Run a pass and print what it changes. Passes it needs are run before and named. May be repeated.",
            metavar="PASS",
        ),
    ] = None,
    passes: Annotated[
        bool,
        typer.Option(
            "--passes",
            help="List the passes that --diff takes, those of other distributions included, and stop.",
            is_eager=True,
            callback=_list_passes,
        ),
    ] = False,
    dump: Annotated[bool, typer.Option("--dump", help="Print the graph, a node a line.")] = False,
    ask: Annotated[Question | None, typer.Option(help="Answer a question about the graph.")] = None,
    svg: Annotated[
        Path | None,
        typer.Option(help="Draw one layer; with --diff, before and after the last pass.", metavar="FILE"),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write one page: sites, passes with pictures, the searchable graph.", metavar="FILE"
        ),
    ] = None,
    graph: Annotated[
        Path | None, typer.Option(help="Write the graph as .graphml, .dot or .json.", metavar="FILE")
    ] = None,
    layer: Annotated[int, typer.Option(help="The layer to draw.", min=0)] = 0,
    stack: Annotated[int, typer.Option(help="The stack (tower) of that layer.", min=0)] = 0,
    meta: Annotated[
        bool,
        typer.Option(
            "--meta",
            help="Make the model without values, so that one of any size fits into memory. A folder with a "
            "configuration alone is read so anyway.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead.")] = False,
) -> None:
    """Show what is in a model and what would become ternary.

    Shown are its stacks, layers and their blocks, each weight's fate, and why the rest is kept.
    """
    file = Path(model)
    if file.suffix == ".onnx" and not file.is_dir():
        _inspect_onnx(file, as_json)
        return
    from ti_fx import find_attention, fork
    from ti_fx.cli._loading import load_graph
    from ti_fx.ir import text
    from ti_fx.ir.pipeline import Pass
    from ti_fx.recipe import chosen_recipe

    chosen = None if recipe is None else chosen_recipe(recipe)
    asked = [Pass.parse(written) for written in diff or ()]
    loaded = load_graph(model, meta)
    gm = loaded.graph
    captured = fork(gm)
    wants_text = dump or diff or ask
    if not find_attention(gm) and not (wants_text or svg or html or graph):
        raise InputError(
            f"{loaded.name} has no attention block: no softmax whose result is multiplied with values that "
            "depend on the input; see its graph with --dump"
        )
    steps, first_shown = _run_passes(gm, chosen, asked, layer, stack)
    shown = steps[first_shown:] if diff else []
    answer = _answer(gm, ask) if ask else None
    written = _write_files(gm, steps, shown, svg, html, graph, layer, stack)
    if as_json:
        facts = _facts(loaded, captured, chosen)
        facts["passes"] = [
            {**asdict(step.report), "diff": text.diff(step.before, step.after)} for step in steps
        ]
        facts["dump"] = text.dump(gm) if dump else None
        facts["answer"] = answer
        print(json.dumps(facts, indent=1))
    else:
        if not wants_text:
            _print_facts(loaded, captured, chosen)
        _print_diffs(steps[:first_shown] if diff else [], shown)
        if dump:
            output.graph_text(text.dump(gm))
        if answer:
            _print_answer(answer)
        for path in written:
            output.say(f"wrote {path}")


def _run_passes(
    gm: GraphModule, recipe: Recipe | None, asked: list[Pass], layer: int, stack: int
) -> tuple[list[Step], int]:
    """Run the recipe's passes, then those asked for, each after what it needs; return also where those begin."""
    from ti_fx.cli._missing import run_after_missing
    from ti_fx.view import follow

    def run(one: Pass) -> Step:
        (step,) = follow(gm, one, layer=layer, stack=stack)
        return step

    steps = [run(one) for one in (*recipe.passes(), *recipe.phases()[0].passes())] if recipe else []
    first: int | None = None
    for one in asked:
        ran = run_after_missing(one, run)
        if not steps and not ran[-1].report.changed and _changes_prepared(gm, one):
            ran = [run(other) for other in (*_preparation(), one)]
        steps += ran
        first = len(steps) - 1 if first is None else first
    return steps, first or 0


def _preparation() -> tuple[Pass, ...]:
    from ti_fx.recipe import Recipe

    return Recipe("default").passes()


def _changes_prepared(gm: GraphModule, one: Pass) -> bool:
    """Return whether a pass that changes nothing of ``gm``, such as strip, would change it once it is prepared."""
    from ti_fx import fork
    from ti_fx.errors import PreconditionError
    from ti_fx.ir.pipeline import Pipeline

    try:
        return Pipeline(*_preparation(), one)(fork(gm)).passes[-1].changed
    except PreconditionError:  # it can't be prepared any more
        return False


def _facts(loaded: Loaded, gm: GraphModule, recipe: Recipe | None) -> dict[str, Any]:
    from ti_fx.analysis import stored_weights
    from ti_fx.cli._structure import quantised_activations, structure
    from ti_fx.ir.facts import facts
    from ti_fx.passes import QuantizeActivations, Ternarize

    ternarize = recipe.ternarize if recipe else Ternarize()
    activations = recipe.activations if recipe else QuantizeActivations()
    weights = stored_weights(gm, ternarize)
    found = facts(gm).capture
    return {
        "model": loaded.name,
        "note": loaded.note,
        "inputs": found.dims if found else {},
        "remarks": _remarks(found) if found else [],
        "nodes": len(gm.graph.nodes),
        **structure(gm),
        "weights": [asdict(row) for row in weights],
        "bytes_before": sum(row.bytes_before for row in weights),
        "bytes_after": sum(row.bytes_after for row in weights),
        "activations": quantised_activations(gm, ternarize, activations),
    }


def _remarks(report: CaptureReport) -> list[str]:
    """Return what capture says beside the inputs' sizes: what the graph has fixed, and what could not be compared."""
    fixed = [f"{where} is static: {why}" for where, why in report.static.items()]
    return [
        *fixed,
        *map(str, report.assumptions),
        *report.followed,
        *([report.unchecked] if report.unchecked else []),
    ]


def _print_facts(loaded: Loaded, gm: GraphModule, recipe: Recipe | None) -> None:
    from ti_fx.analysis import stored_weights
    from ti_fx.cli._structure import print_activations, print_structure

    facts = _facts(loaded, gm, recipe)
    output.say(loaded.name + (f" ({loaded.note})" if loaded.note else ""))
    for name, sizes in facts["inputs"].items():
        output.say(f"  {name}: [{', '.join(map(str, sizes))}]")
    for remark in facts["remarks"]:
        output.say(f"  {remark}")
    output.say("")
    print_structure(facts)
    _print_weights(stored_weights(gm, recipe.ternarize if recipe else None))
    print_activations(facts["activations"])


def _print_weights(weights: list[StoredWeight]) -> None:
    """Print a table for each fate of a weight, ternary ones first; numbers in a path become stars."""
    from ti_fx.cli._structure import starred

    before, after = sum(row.bytes_before for row in weights), sum(row.bytes_after for row in weights)
    unit, size = ("MB", 1e6) if before >= 1e7 else ("kB", 1e3)
    fates: dict[str, list[StoredWeight]] = {}
    for row in sorted(weights, key=lambda row: (not row.is_ternary, len(row.shape) == 1)):
        is_vector = len(row.shape) == 1 and not row.is_ternary
        reason = "vectors (norms, biases, scales)" if is_vector else row.reason
        fates.setdefault(f"{row.encoding}: {reason}", []).append(row)
    for fate, rows in fates.items():
        groups: dict[tuple[str, str], list[StoredWeight]] = {}
        for row in rows:
            groups.setdefault((starred(row.name), "×".join(map(str, row.shape))), []).append(row)
        shown = groups if "vectors" not in fate else {("in all", ""): rows}
        columns = ("weight", "count", "shape", f"{unit} now", f"{unit} then")
        output.table(columns, [_weight_row(*key, same, size) for key, same in shown.items()], _capital(fate))
    ratio = f", {before / after:.1f} times smaller" if after else ""
    now, then = output.shown(before / size), output.shown(after / size)
    output.say(f"{now} {unit} of weights now, {then} {unit} with packed ternary weights{ratio}")


def _weight_row(pattern: str, shape: str, rows: list[StoredWeight], unit: float) -> tuple[output.Cell, ...]:
    now, then = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
    return pattern, len(rows), shape, now / unit, then / unit


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _print_diffs(before: list[Step], shown: list[Step]) -> None:
    from ti_fx.ir import text

    if before:
        output.say("first ran: " + ", ".join(step.name for step in before))
    for step in shown:
        report = step.report
        output.say(f"{step.name}: {report.added} added, {report.removed} removed, {report.rewired} rewired")
        if report.explanation:
            output.say(report.explanation)
        output.diff_text(text.diff(step.before, step.after))


def _answer(gm: GraphModule, question: Question) -> dict[str, Any]:
    from ti_fx.view import ask

    found = ask(gm, question.value)
    return {"question": found.question, **{title: list(names) for title, names in found.groups.items()}}


def _print_answer(answer: dict[str, Any]) -> None:
    output.say(answer["question"])
    for title, names in list(answer.items())[1:]:
        output.say(f"  {title}: {len(names)}")
        for name in names[:_LISTED]:
            output.say(f"    {name}")
        if len(names) > _LISTED:
            output.say(f"    and {len(names) - _LISTED} more (--json lists all)")


def _write_files(
    gm: GraphModule,
    steps: list[Step],
    shown: list[Step],
    svg: Path | None,
    html: Path | None,
    graph: Path | None,
    layer: int,
    stack: int,
) -> list[Path]:
    from ti_fx import view
    from ti_fx.files import atomic_write

    if svg is not None:
        last = shown[-1] if shown else None
        drawn = (
            view.svg(gm, layer, stack)
            if last is None
            else view.svg_diff(last.before, last.after, layer, stack, ("before", f"after {last.name}"))
        )
        atomic_write(svg, drawn)
    if html is not None:
        view.html(steps or gm, html)
    if graph is not None:
        view.write_graph(gm, graph)
    return [path for path in (svg, html, graph) if path is not None]


def _inspect_onnx(path: Path, as_json: bool) -> None:
    from ti_fx.cli._onnx_file import describe, show

    facts = describe(path)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        show(facts)
