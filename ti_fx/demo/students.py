"""The demo trains TernaryBERT, TI-G and the default recipe from one teacher, for as many steps, with the same seed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ti_fx.demo.data import MAX_LENGTH, Questions, TokenizedQuestions, tokenized
from ti_fx.demo.measure import logits_of, torch_call
from ti_fx.demo.teacher import ProgressBar, quiet_loading
from ti_fx.ir.edit import input_names
from ti_fx.recipe import DEFAULT, Recipe
from ti_fx.train import TernaryTrainer
from ti_fx.train.scores import scores

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
METHODS = tuple(dict.fromkeys(("ternarybert", "ti-g", DEFAULT)))
BEST = {"ternarybert": 2e-4, "ti-g": 2e-4, "calibrated": 4e-4}  # of 2e-4 and 4e-4


@dataclass(frozen=True)
class StudentSettings:
    """How the students are trained; ``steps`` goes into the recipe.

    Each method has the learning rate of two at which its KL on the validation split was least, with seed 0.
    """

    steps: int = 160
    rates: Mapping[str, float] = field(default_factory=lambda: dict(BEST))
    batch_size: int = 32
    warmup: float = 0.1
    weight_decay: float = 0.01
    evaluate_every: int = 20
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
        JSON values: final validation scores, the KL of each validation row then, and the log (losses by name,
        validation every few steps, each with the seconds that calibration and training steps took until then).
    """
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    set_seed(seed)
    with quiet_loading():
        model = AutoModelForSequenceClassification.from_pretrained(teacher)
    labels = len(data.label_names)
    chosen = recipe(method, settings)
    validation = tokenized(data.validation, tokenizer, label_count=labels, max_length=settings.max_length)
    measured = _Validation(model, validation, tokenizer, settings.evaluate_every)
    clock = _Clock()
    trainer = TernaryTrainer(
        model,
        chosen,
        _arguments(settings, settings.rates[method], seed, out),
        train_dataset=tokenized(data.train, tokenizer, label_count=labels, max_length=settings.max_length),
        processing_class=tokenizer,
        callbacks=[clock, measured],  # in this order: measuring is no training
    )
    measured.trainer = trainer
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressBar())
    started = time.perf_counter()
    trainer.calibrate()
    calibrated = time.perf_counter() - started
    measured.measure(0)
    trainer.train()
    trainer.save_model(str(out / "checkpoint"))
    chosen.save(out / "recipe.json")
    logged = sorted([*trainer.state.log_history, *measured.history], key=lambda row: row["step"])
    history = [{**row, "train_seconds": calibrated + clock.at(int(row["step"]))} for row in logged]
    return {
        "method": method,
        "steps": trainer.state.global_step,
        "learning_rate": settings.rates[method],
        "calibration_seconds": calibrated,
        "train_seconds": calibrated + clock.at(trainer.state.global_step),
        "history": history,
        "validation": _last(history),
        "kl_rows": measured.rows,
    }


def _arguments(settings: StudentSettings, rate: float, seed: int, out: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        learning_rate=rate,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=64,
        warmup_steps=settings.warmup,
        lr_scheduler_type="linear",
        weight_decay=settings.weight_decay,
        seed=seed,
        data_seed=seed,
        train_sampling_strategy="group_by_length",
        logging_steps=15,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class _Validation(TrainerCallback):
    """Measures the student on the validation split, in its order: accuracy, macro-F1 and the KL from the teacher.

    Trainer's own evaluation sorts rows by length, so that none could be held against its teacher's.
    """

    trainer: TernaryTrainer

    def __init__(
        self,
        teacher: torch.nn.Module,
        rows: TokenizedQuestions,
        tokenizer: PreTrainedTokenizerBase,
        every: int,
    ) -> None:
        self.data, self.tokenizer, self.every = rows, tokenizer, every
        self.teacher = self._log_softmax(torch_call(teacher, INPUTS))[0]
        self.rows: list[float] = []
        self.history: list[dict[str, Any]] = []

    def measure(self, step: int) -> None:
        """Add a row of scores."""
        student = self.trainer.student()
        found, logits, labels = self._log_softmax(torch_call(student, input_names(student)))
        self.rows = F.kl_div(found, self.teacher, reduction="none", log_target=True).sum(-1).tolist()
        values = {**scores(logits, labels), "kl": sum(self.rows) / len(self.rows)}
        self.history.append({"step": step, **{f"eval_{name}": value for name, value in values.items()}})

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(state.global_step)

    def _log_softmax(self, call: Any) -> tuple[torch.Tensor, Any, Any]:
        logits, labels = logits_of(call, self.data, self.tokenizer)
        return torch.from_numpy(logits).double().log_softmax(-1), logits, labels


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
    return {name: row[f"eval_{name}"] for name in ("accuracy", "macro_f1", "kl")}


def steps_to(
    history: list[dict[str, Any]], key: str, target: float, *, at_least: bool
) -> dict[str, float] | None:
    """Return the first validated step (and its training seconds) that reached a target, None if none did."""
    for row in history:
        if key in row and (row[key] >= target if at_least else row[key] <= target):
            return {"steps": row["step"], "seconds": row["train_seconds"]}
    return None
