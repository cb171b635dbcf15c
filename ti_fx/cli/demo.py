"""The command ``ti-fx demo`` does the main job on a small model and data that are installed with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """\b
Examples:
  ti-fx demo
  ti-fx demo --quick --out runs/try"""


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results; stages that ran before are reused.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads to compute with; other numbers of them give other accuracies.")
    ] = 2,
    quick: Annotated[
        bool, typer.Option(help="A few steps only, to see every stage run; its numbers mean nothing.")
    ] = False,
) -> None:
    """Teach a real model a real task and make its weights ternary.

    Fine-tunes all-MiniLM-L6-v2 on question types, trains three students from it (TernaryBERT, TI-G and the default
    recipe), exports them, runs them in ONNX Runtime, and writes results.json, report.html and student.onnx. Takes
    about 16 minutes on 2 idle cores of a slow processor, and one the second time.
    """
    from ti_fx.demo.run import run
    from ti_fx.demo.students import StudentSettings
    from ti_fx.demo.teacher import TeacherSettings

    if quick:
        teacher = TeacherSettings(max_steps=8)
        settings = StudentSettings(steps=66, evaluate_every=33, batch_size=4)
        run(out, seed=seed, threads=threads, teacher_settings=teacher, student_settings=settings)
    else:
        run(out, seed=seed, threads=threads)
