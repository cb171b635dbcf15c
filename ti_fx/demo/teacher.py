"""The demo fine-tunes a pre-trained encoder on the question types, in full precision, as the teacher.

The loop is transformers' Trainer. The settings were chosen by accuracy on the validation split alone, where
differences under a point are chance: it has 537 questions.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ti_fx.demo.data import MAX_LENGTH, Questions, Row, TokenizedQuestions, tokenized
from ti_fx.errors import InputError
from ti_fx.train.finished import finished_folder
from ti_fx.train.scores import scores_of


@dataclass(frozen=True)
class TeacherSettings:
    """How the teacher is fine-tuned: AdamW, linear warm-up, then linear decay to zero.

    ``epochs`` may be fractional; ``max_steps`` (optimiser steps), when given, replaces it. ``warmup`` is a
    share of all steps.
    """

    learning_rate: float = 1e-4
    epochs: float = 3.0
    batch_size: int = 32
    warmup: float = 0.1
    weight_decay: float = 0.01
    label_smoothing: float = 0.1
    max_length: int = MAX_LENGTH
    max_steps: int | None = None


TEACHER_SETTINGS = TeacherSettings()


@dataclass(frozen=True)
class TeacherRun:
    """What a fine-tuning did: optimiser steps, cost, last validation scores, the Trainer's log for curves.

    ``seconds`` is wall time and ``cpu_seconds`` the time of all threads together, both with the evaluations.
    """

    steps: int
    seconds: float
    cpu_seconds: float
    validation: dict[str, float]
    history: tuple[dict[str, float], ...]


def fine_tune(
    model_folder: Path,
    data: Questions,
    out: Path,
    *,
    seed: int = 0,
    settings: TeacherSettings = TEACHER_SETTINGS,
    progress: bool = True,
) -> TeacherRun:
    """Fine-tune the encoder in ``model_folder`` on ``data.train`` and save it and its tokenizer in ``out``.

    The test split is not touched. ``out`` appears complete or not at all; a folder that was there is replaced
    only when training and saving have succeeded. The same seed, machine and number of threads give the same
    weights.

    Raises:
        DataError: a split is empty or a label is out of range.
        InputError: ``model_folder`` holds no model, or ``out`` can't be written.
    """
    if not (model_folder / "config.json").is_file():
        raise InputError(f"{model_folder} has no config.json; give the folder of a saved transformers model")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    label_count = len(data.label_names)
    train = tokenized(data.train, tokenizer, label_count=label_count, max_length=settings.max_length)
    validation = tokenized(
        data.validation, tokenizer, label_count=label_count, max_length=settings.max_length
    )
    set_seed(seed)  # before the model: its new classifier is drawn at random
    with quiet_loading():
        model = AutoModelForSequenceClassification.from_pretrained(
            model_folder,
            num_labels=label_count,
            id2label=dict(enumerate(data.label_names)),
            label2id={name: label for label, name in enumerate(data.label_names)},
        )
    with finished_folder(out) as temporary, tempfile.TemporaryDirectory() as scratch:
        trainer = _question_trainer(
            model, tokenizer, _training_arguments(settings, seed, scratch), train, validation
        )
        if progress:
            trainer.add_callback(ProgressBar())
        started, started_cpu = time.perf_counter(), time.process_time()
        trainer.train()
        scores = trainer.evaluate()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
        with quiet_loading():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return TeacherRun(
        steps=trainer.state.global_step,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        validation=_named_scores(scores),
        history=tuple(trainer.state.log_history),
    )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    settings: TeacherSettings = TEACHER_SETTINGS,
) -> dict[str, float]:
    """Return ``accuracy`` and ``macro_f1`` of a classifier on ``rows``, batched as in ``settings``.

    Raises:
        DataError: there are no rows, or a label is out of the model's range.
    """
    dataset = tokenized(
        rows, tokenizer, label_count=len(model.config.id2label or ()), max_length=settings.max_length
    )
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _question_trainer(
            model, tokenizer, _training_arguments(settings, 0, scratch), None, dataset
        )
        return _named_scores(trainer.evaluate())


def _question_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    train: TokenizedQuestions | None,
    held_out: TokenizedQuestions,
) -> Trainer:
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=scores_of,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _training_arguments(settings: TeacherSettings, seed: int, scratch: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        max_steps=-1 if settings.max_steps is None else settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        warmup_steps=settings.warmup,
        lr_scheduler_type="linear",
        weight_decay=settings.weight_decay,
        label_smoothing_factor=settings.label_smoothing,
        seed=seed,
        # Questions have 13 tokens on average but up to 41: batches of one length waste little padding.
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


class ProgressBar(ProgressCallback):
    """The bar alone: the Trainer's own also prints every log line, which belongs in the report's curves."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **others: Any,
    ) -> None:
        """Print nothing."""


def _named_scores(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[f"eval_{name}"] for name in ("accuracy", "macro_f1")}


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' bars and its report that the classifier is new: here it always is."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
