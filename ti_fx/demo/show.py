"""The demo shows its results as tables in the terminal and as a page with curves, graphs and errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ti_fx.analysis import layer_errors
from ti_fx.demo import students
from ti_fx.demo.data import Questions
from ti_fx.demo.teacher import quiet_loading
from ti_fx.frontend.capture import capture
from ti_fx.passes import Pack, Strip
from ti_fx.recipe import DEFAULT
from ti_fx.train import load
from ti_fx.view import follow
from ti_fx.view.report import (
    BarChart,
    Cell,
    GraphSteps,
    LineChart,
    Report,
    Section,
    Table,
    Text,
    environment,
    write_report,
)

NAMES = {
    "full precision": "full precision",
    "ternarybert": "TernaryBERT",
    "ti-g": "TI-G",
    DEFAULT: f"{DEFAULT} (the default)",
    "fp32": "fp32 ONNX",
    "dynamic-int8": "dynamic int8",
    "dynamic int8": "dynamic int8 (ONNX Runtime)",
}


def print_table(results: dict[str, Any]) -> None:
    """Print the results as one table a topic."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables(results):
        shown = RichTable(title=table.title, caption=table.note or None, title_justify="left")
        for index, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*(_text(cell) for cell in row))
        console.print(shown)


def tables(results: dict[str, Any]) -> list[Table]:
    """Return the results' tables, for the terminal and the page."""
    return [_converged(results), _accuracy(results), _files(results), _latency(results), _cost(results)]


def _accuracy(results: dict[str, Any]) -> Table:
    by_model: dict[str, dict[str, dict[str, float]]] = {}
    for row in results["test"]["scores"]:
        by_model.setdefault(row["model"], {})[row["engine"]] = row
    rows: list[list[Cell]] = []
    for name, engines in by_model.items():
        cells: list[Cell] = [NAMES[name]]
        for engine in ("PyTorch", "ONNX Runtime"):
            found = engines.get(engine)
            cells += [_percent(found, "accuracy"), _percent(found, "macro_f1")]
        same = results["test"]["agreement"].get(name)
        cells += [_percent(same, "same_class"), None if same is None else f"{100 * same['p99']:.3f}%"]
        rows.append(cells)
    columns = (
        "model",
        "accuracy, PyTorch",
        "macro-F1",
        "accuracy, ONNX Runtime",
        "macro-F1",
        "same class",
        "p99 logit gap",
    )
    note = (
        f"Test split, {results['test']['rows']} questions of 6 types; the gap is relative to the logits' range. "
        f"{_reproduced(results)}"
    )
    return Table("Accuracy on the test split", columns, rows, note)


def _reproduced(results: dict[str, Any]) -> str:
    """Say what gives the same accuracies again, and how far apart accuracies have to be to mean something."""
    found, rows = results["circumstances"], results["test"]["rows"]
    share = results["students"][DEFAULT]["validation"]["accuracy"]
    where = f"{found['threads']} threads of {found['processor']} ({found['vector instructions']})"
    return (
        f"Seed {results['seed']}, {where}: another processor adds in another order, which training carries on to other "
        f"weights. One standard error is {100 * (share * (1 - share) / rows) ** 0.5:.1f} points."
    )


def _files(results: dict[str, Any]) -> Table:
    rows: list[list[Cell]] = []
    for name in ("fp32", "dynamic-int8", *results["students"]):
        entry = results["exports"][name]
        code, both = entry.get("code_bits"), entry.get("bits")
        share = entry["bytes"] / results["exports"]["fp32"]["bytes"]
        rows.append(
            [
                NAMES[name],
                f"{entry['bytes'] / 1e6:.2f} MB",
                f"{1 / share:.1f}x smaller" if share < 1 else None,
                None if code is None else f"{code:.2f}",
                None if both is None else f"{both:.3f}",
            ]
        )
    return Table(
        "Size on disk",
        ("file", "size", "against fp32", "bits per ternary weight, codes", "codes and scales"),
        rows,
    )


def _latency(results: dict[str, Any]) -> Table:
    rows: list[list[Cell]] = []
    for row in results["latency"]:
        taken = row["milliseconds"]
        rows.append(
            [
                f"{row['threads']} threads" if row["threads"] > 1 else "1 thread",
                row["batch"],
                *(f"{taken[name]:.1f} ms" for name in ("fp32", "dynamic-int8", DEFAULT)),
                f"{taken['fp32'] / taken[DEFAULT]:.2f}x",
                f"{taken['dynamic-int8'] / taken[DEFAULT]:.2f}x",
            ]
        )
    columns = (
        "threads",
        "batch",
        "fp32 ONNX",
        "dynamic int8",
        NAMES[DEFAULT],
        "over fp32",
        "over dynamic int8",
    )
    note = "Medians of calls in turn, sequence 128, all ONNX Runtime optimisations; above 1x the student is faster."
    return Table("Latency in ONNX Runtime", columns, rows, note)


def _converged(results: dict[str, Any]) -> Table:
    rows: list[list[Cell]] = []
    for method, result in results["students"].items():
        curve = [row["eval_kl"] for row in result["history"] if "eval_kl" in row]
        soon = results["reached"][method]["kl"]
        rows.append(
            [
                NAMES[method],
                f"{result['learning_rate']:g}",
                result["steps"],
                f"{curve[0]:.4f}",
                f"{result['validation']['kl']:.4f}",
                "not reached" if soon is None else int(soon["steps"]),
                None if soon is None else f"{soon['seconds']:.0f} s",
                _percent(result["validation"], "accuracy"),
            ]
        )
    columns = (
        "method",
        "learning rate",
        "steps",
        "KL at the start",
        "KL at the end",
        "steps to TernaryBERT's last KL",
        "seconds",
        "accuracy",
    )
    note = (
        f"KL of the classes from the teacher's, on the validation split; each method has its own best learning rate. "
        f"Seconds are of calibration and training steps. {_difference(results)}"
    )
    return Table("How soon a student is as its teacher", columns, rows, note)


def _difference(results: dict[str, Any]) -> str:
    """Say how far the default recipe is from TernaryBERT, beside what these rows can tell."""
    default, other = (torch.tensor(results["students"][name]["kl_rows"]) for name in (DEFAULT, "ternarybert"))
    gap = default - other
    error = float(gap.std() / len(gap) ** 0.5)
    return (
        f"{DEFAULT} ends {float(gap.mean()):+.4f} from TernaryBERT; the standard error of that over {len(gap)} rows "
        f"is {error:.4f}, and this is one seed: other seeds are --seed."
    )


def _cost(results: dict[str, Any]) -> Table:
    rows: list[list[Cell]] = [
        [NAMES[method], result["steps"], f"{result['train_seconds']:.0f} s", None]
        for method, result in results["students"].items()
    ]
    rows += [
        [f"stage {name}", None, f"{one['seconds']:.0f} s", "reused" if one["reused"] else None]
        for name, one in results["stages"].items()
    ]
    return Table("Cost", ("what", "steps", "seconds", "from an earlier run"), rows)


def write_page(results: dict[str, Any], path: Path, checkpoint: Path, teacher: Path, data: Questions) -> None:
    """Write the report: tables, curves, the graph before and after each pass, error by layer."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    texts = [text for text, _ in data.validation[:64]]
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    with quiet_loading():
        model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    reference = capture(model, {name: value[:2] for name, value in batch.items()})
    student = load(checkpoint)
    errors = layer_errors(student, batch, reference=reference, tokens=batch["attention_mask"])
    layers = sorted({row.layer for row in errors})
    points = list(dict.fromkeys(row.point for row in errors))
    found = {(row.point, row.layer): row.relative_error for row in errors}
    recipe = students.recipe(DEFAULT)
    interventions = [phase.intervene for phase in recipe.phases()]
    steps = follow(reference, *recipe.passes(), *interventions, Strip(), Pack())
    sections: list[Section] = [
        *tables(results),
        _curve(results, "eval_accuracy", "Validation accuracy", "accuracy"),
        _curve(results, "eval_kl", "KL from the teacher on the validation split", "KL, nats", log_scale=True),
        _curve(results, "loss", "Training loss", "loss, weighted sum", log_scale=True),
        BarChart(
            "Error by layer",
            ["embeddings" if layer < 0 else f"layer {layer}" for layer in layers],
            {point: [found.get((point, layer), float("nan")) for layer in layers] for point in points},
            "layer",
            "relative L2 error",
            f"{NAMES[DEFAULT]}'s student against the full-precision model on 64 validation questions, without padding.",
        ),
        GraphSteps(
            "The graph before and after each pass",
            steps,
            "The first layer as a picture, and the whole difference as text. The student is named as in the model, the "
            "teacher's nodes end in _t.",
        ),
        environment(
            {
                **{name: str(value) for name, value in results["circumstances"].items()},
                "seed": str(results["seed"]),
                "data SHA-256": results["data"]["source_sha256"],
            }
        ),
        Text(
            "How it was made",
            [
                "The teacher is all-MiniLM-L6-v2, fine-tuned on TREC question types. The students start from it, "
                "train for the same number of steps with the same seed, and are evaluated in ONNX Runtime.",
                "Everything was chosen on the validation split; the test split was read only for the tables above.",
            ],
        ),
    ]
    subtitle = (
        f"{NAMES[DEFAULT]} in ONNX Runtime against its full-precision teacher; torch {torch.__version__}"
    )
    write_report(Report("ti_fx demo: a transformer at two bits a weight", sections, subtitle), path)


def _curve(results: dict[str, Any], key: str, title: str, label: str, log_scale: bool = False) -> LineChart:
    series = {}
    for method, result in results["students"].items():
        rows = [row for row in result["history"] if key in row]
        series[NAMES[method]] = ([row["step"] for row in rows], [row[key] for row in rows])
    return LineChart(title, series, "optimiser step", label, log_scale=log_scale)


def _percent(found: dict[str, float] | None, key: str) -> str | None:
    return None if found is None else f"{100 * found[key]:.2f}%"


def _text(cell: Cell) -> str:
    return "-" if cell is None else str(cell)
