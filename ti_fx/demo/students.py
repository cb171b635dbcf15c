"""The demo trains TernaryBERT and the default recipe from one teacher, for as many steps, with the same seed."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ti_fx.demo.data import MAX_LENGTH, Questions, tokenized
from ti_fx.demo.teacher import ProgressBar, quiet_loading
from ti_fx.recipe import Recipe
from ti_fx.train import TernaryTrainer
from ti_fx.train.scores import scores_of


@dataclass(frozen=True)
class StudentSettings:
    """How both students are trained; ``steps`` goes into the recipe. Chosen on the validation split alone."""

    steps: int = 540  # four epochs
    learning_rate: float = 2e-4
    batch_size: int = 32
    warmup: float = 0.1
    weight_decay: float = 0.01
    evaluate_every: int = 60
    max_length: int = MAX_LENGTH


STUDENT_SETTINGS = StudentSettings()


def recipe(method: str, settings: StudentSettings = STUDENT_SETTINGS) -> Recipe:
    """Return the published recipe with the demo's number of steps."""
    return dataclasses.replace(Recipe.preset(method), steps=settings.steps)


def train(
    method: str,
    teacher: Path,
    data: Questions,
    out: Path,
    *,
    seed: int,
    settings: StudentSettings = STUDENT_SETTINGS,
) -> dict[str, Any]:
    """Train one student and write its checkpoint and recipe into ``out``.

    Returns:
        JSON values: final validation scores and the log (losses by name, validation every few steps, each with the
        seconds that training steps took until then).
    """
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    set_seed(seed)
    with quiet_loading():
        model = AutoModelForSequenceClassification.from_pretrained(teacher)
    labels = len(data.label_names)
    chosen = recipe(method, settings)
    clock = _Clock()
    trainer = TernaryTrainer(
        model,
        chosen,
        _arguments(settings, seed, out),
        train_dataset=tokenized(data.train, tokenizer, label_count=labels, max_length=settings.max_length),
        eval_dataset=tokenized(
            data.validation, tokenizer, label_count=labels, max_length=settings.max_length
        ),
        processing_class=tokenizer,
        compute_metrics=scores_of,
        evaluate_distillation=True,
        callbacks=[clock],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressBar())
    trainer.train()
    trainer.save_model(str(out / "checkpoint"))
    chosen.save(out / "recipe.json")
    history = [{**row, "train_seconds": clock.at(int(row["step"]))} for row in trainer.state.log_history]
    return {
        "method": method,
        "steps": trainer.state.global_step,
        "train_seconds": clock.at(trainer.state.global_step),
        "history": history,
        "validation": _last(history),
    }


def _arguments(settings: StudentSettings, seed: int, out: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=64,
        warmup_steps=settings.warmup,
        lr_scheduler_type="linear",
        weight_decay=settings.weight_decay,
        seed=seed,
        data_seed=seed,
        train_sampling_strategy="group_by_length",
        eval_strategy="steps",
        eval_steps=settings.evaluate_every,
        logging_steps=15,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class _Clock(TrainerCallback):
    """Seconds spent in training steps, evaluations left out."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {0: 0.0}
        self.total = 0.0
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.total += time.perf_counter() - self.started
        self.seconds[state.global_step] = self.total

    def at(self, step: int) -> float:
        """Return the seconds that the first ``step`` steps took."""
        return self.seconds.get(step, self.total)


def _last(history: list[dict[str, Any]]) -> dict[str, float]:
    row = next(row for row in reversed(history) if "eval_accuracy" in row)
    return {name: row[f"eval_{name}"] for name in ("accuracy", "macro_f1", "distillation")}


def steps_to(
    history: list[dict[str, Any]], key: str, target: float, *, at_least: bool
) -> dict[str, float] | None:
    """Return the first validated step (and its training seconds) that reached a target, None if none did."""
    for row in history:
        if key in row and (row[key] >= target if at_least else row[key] <= target):
            return {"steps": row["step"], "seconds": row["train_seconds"]}
    return None
