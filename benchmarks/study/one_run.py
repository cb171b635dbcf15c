"""Trains one student by one arm and measures it on its way."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments, set_seed

from study.arms import Arm
from study.rows import Data, Yardstick
from study.settings import Setting
from ti_fx.train import TernaryTrainer

MARKS = 8  # how often a student is measured after its start


@dataclass(frozen=True)
class Key:
    """Which run it is."""

    setting: str
    arm: str
    rate: float
    seed: int


class Curve(TrainerCallback):
    """Measures the stripped student at some steps; the seconds are of calibration and training."""

    def __init__(self, marks: Sequence[int], yardstick: Yardstick) -> None:
        self.marks, self.yardstick = frozenset(marks), yardstick
        self.rows: list[dict[str, float]] = []
        self.seconds = self.started = 0.0
        self.trainer: TernaryTrainer

    def measure(self, step: int) -> None:
        """Add a row."""
        found = self.yardstick.measure(self.trainer.student())
        self.rows.append({"step": step, "seconds": round(self.seconds, 3), **_rounded(asdict(found))})

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Stop the clock, and measure at a mark."""
        self.seconds += time.perf_counter() - self.started
        if state.global_step in self.marks:
            self.measure(state.global_step)


def train(
    key: Key,
    setting: Setting,
    arm: Arm,
    teacher: nn.Module,
    data: Data,
    validation: Yardstick,
    test: Yardstick,
) -> dict[str, Any]:
    """Return a run as JSON values: its key, the curve on validation rows, and the end on test rows."""
    set_seed(key.seed)
    recipe = arm.recipe(setting.steps)
    curve = Curve([round(setting.steps * part / MARKS) for part in range(1, MARKS + 1)], validation)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            learning_rate=key.rate,
            per_device_train_batch_size=setting.batch_size,
            warmup_steps=0.1,
            lr_scheduler_type="linear",
            weight_decay=0.01,
            seed=key.seed,
            data_seed=key.seed,
            dataloader_drop_last=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = TernaryTrainer(
            teacher,
            recipe,
            arguments,
            train_dataset=list(data.train),
            data_collator=data.collate,
            compile="off",
            callbacks=[curve],
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        curve.trainer = trainer
        started = time.perf_counter()
        trainer.calibrate()
        curve.seconds = time.perf_counter() - started
        curve.measure(0)
        trainer.train()
        end = test.measure(trainer.student())
    return {**asdict(key), "steps": setting.steps, "curve": curve.rows, "test": _rounded(asdict(end))}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in values.items()}
