"""The command ``ti-fx train`` trains a ternary student of a fine-tuned text classifier, with Teacher Intervention."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ti_fx.cli import _output as output
from ti_fx.cli._encodings import HELP, METAVAR, chosen_encodings
from ti_fx.cli._run_folder import (
    RECIPE,
    RESULTS,
    check_folder,
    check_recipe_of,
    check_writable,
    is_finished,
)
from ti_fx.errors import InputError, first_line
from ti_fx.numerics.encodings import AUTO

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from ti_fx.recipe import Recipe
    from ti_fx.train.data import LabelledTexts

EXAMPLES = """\b
Example:
  ti-fx train ./my-classifier --recipe ti-g --data train.csv --eval valid.csv --out runs/ti-g
  ti-fx export runs/ti-g --out student.onnx

train.csv has a header with a text and a label column; a label is one of the model's names or ids. Stopped half-way?
The same command with --resume goes on from the newest checkpoint."""

EPOCHS = 3  # as published: AdamW, linear decay, warm-up over a tenth, 3 epochs
WARM_UP = 0.1
MAX_LENGTH = 128
WEIGHT_DECAY = 0.01
EVALUATIONS = 10
LOGS = 20
KEPT_CHECKPOINTS = 2


class CompileChoice(StrEnum):
    """What ``--compile`` takes."""

    on = "on"
    off = "off"
    auto = "auto"


def train(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The teacher: a folder (or hub name) of a Hugging Face sequence classification model that is already "
            "fine-tuned on these labels, with its tokenizer.",
            show_default=False,
        ),
    ],
    data: Annotated[
        Path, typer.Option(help="Training rows: .csv or .tsv with a header, .json or .jsonl.", metavar="FILE")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, recipe and results.", metavar="DIR")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A preset's name (ti-fx recipes lists them) or a recipe file; left out: the default preset.",
            metavar="NAME|FILE",
        ),
    ] = None,
    encoding: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{HELP} auto: the fastest on this machine for the first two training rows (ti-fx choose "
            "measures for other sizes and limits). Left out: the recipe's.",
            metavar=METAVAR,
        ),
    ] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option(
            "--pass",
            help="A pass to run after the recipe's, as text: my-pass{key=value}; may be given again. It is one of "
            "ti_fx, or of a distribution with an entry point in the group ti_fx.passes.",
            metavar="PASS",
        ),
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="Rows to evaluate on, in the same form.", metavar="FILE")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Optimiser steps in all; left out: the recipe's, else 3 epochs.", min=1),
    ] = None,
    intervention_steps: Annotated[
        float | None,
        typer.Option(
            help="How long the teacher intervenes in a preset: steps (6 or more), or a fraction of training (0.3). "
            "Left out: 60 steps as published, or a third of a training that is too short for them.",
            metavar="N",
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint whose weights the student begins with, as ti-fx calibrate writes it; left out: the "
            "teacher's.",
            metavar="DIR",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows a step.", min=1)] = 32,
    learning_rate: Annotated[float, typer.Option(help="The peak; linear decay after 10% warm-up.")] = 2e-5,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens at which a text is cut; left out: 128, or what the model takes.", min=3),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.", min=0)] = 0,
    compile: Annotated[
        CompileChoice, typer.Option(help="torch.compile; auto: where training is long enough to repay it.")
    ] = CompileChoice.auto,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in DIR.")
    ] = False,
    text_column: Annotated[
        str | None, typer.Option(help="Left out: text, sentence, question or content.", metavar="NAME")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Left out: label, labels or class.", metavar="NAME")
    ] = None,
) -> None:
    """Train a ternary student of a text classifier.

    The classifier itself is the teacher.
    """
    if not 0 < learning_rate < math.inf:
        raise InputError(f"--learning-rate is {learning_rate}; give a positive number, such as 2e-5")
    from ti_fx.cli._recipe import fitted, intervened, with_encodings
    from ti_fx.cli._start import require_start, require_teacher
    from ti_fx.recipe import DEFAULT
    from ti_fx.train.data import read_texts

    recipe = recipe or DEFAULT
    chosen = with_passes(intervened(recipe, intervention_steps), passes or ())
    chosen = with_encodings(chosen, chosen_encodings(encoding, measured=True))
    if resume and chosen.activations.encoding == AUTO:
        raise InputError(
            "--resume goes on with the encoding that was chosen, so auto is none; its name is in ti_fx.json of "
            f"{out}'s newest checkpoint"
        )
    check_folder(out, chosen, resume)
    require_teacher(model)
    if start is not None:
        require_start(start, chosen)
    teacher, tokenizer = _classifier(model)
    names = {int(index): name for index, name in (teacher.config.id2label or {}).items()}
    columns = {"text_column": text_column, "label_column": label_column}
    training = read_texts(data, names, **columns)
    held_out = None if evaluation is None else read_texts(evaluation, names, **columns)
    length = _length(max_length, teacher.config)
    if steps is not None:
        chosen = replace(chosen, steps=steps)
    total = steps or chosen.steps or EPOCHS * math.ceil(len(training) / batch_size)
    if intervention_steps is None:
        chosen = fitted(chosen, recipe, total)
    run = _Run(chosen, training, held_out, batch_size, learning_rate, seed, compile.value, length)
    run.check_steps()
    if resume:
        check_recipe_of(out, run.recipe)
    if resume and is_finished(out, run.recipe, run.steps):
        output.say(
            f"the run in {out} is finished, {run.steps} of {run.steps} steps: nothing was changed; export it with "
            f"ti-fx export {out} --out student.onnx, or train for more --steps into another --out"
        )
        return
    check_writable(out)
    run.train(teacher, teacher if start is None else _classifier(str(start))[0], tokenizer, out, resume)


def with_passes(recipe: Recipe, written: Sequence[str]) -> Recipe:
    """Return the recipe with further passes behind its own."""
    from ti_fx.ir.pipeline import Pass

    return replace(recipe, extra_passes=(*recipe.extra_passes, *map(Pass.parse, written)))


@dataclass(frozen=True)
class _Run:
    """The checked request."""

    recipe: Recipe
    training: LabelledTexts
    held_out: LabelledTexts | None
    batch_size: int
    learning_rate: float
    seed: int
    compile: Any
    max_length: int

    @property
    def steps(self) -> int:
        return self.recipe.steps or EPOCHS * math.ceil(len(self.training) / self.batch_size)

    def check_steps(self) -> None:
        """Raise InputError if the recipe's phases, or those of its chain, need more steps than there are."""
        from ti_fx.train.chain import stage_steps
        from ti_fx.train.schedule import spans

        ways = "raise --steps, lower --intervention-steps, or shorten the phases in the recipe's file"
        for one, steps in zip(self.recipe.chain(), stage_steps(self.recipe, self.steps), strict=True):
            spans(one.phases(), steps, ways)

    def train(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        out: Path,
        resume: bool,
    ) -> None:
        """Train, evaluate the stripped student and write checkpoint, recipe and results into ``out``."""
        from transformers import PrinterCallback, ProgressCallback, set_seed

        from ti_fx.cli._progress import TrainingProgress
        from ti_fx.cli._recipe import calibrate, say_decisions
        from ti_fx.files import atomic_write
        from ti_fx.train import trainers
        from ti_fx.train.data import TokenisedTexts
        from ti_fx.train.scores import scores_of

        output.say(f"{self.recipe}\n{len(self.training):,} training rows, {self.steps:,} steps")
        set_seed(self.seed)
        held_out = self.held_out and TokenisedTexts(self.held_out, tokenizer, self.max_length)
        seconds = 0.0
        stages = trainers(
            student,
            self.recipe,
            self._arguments(out),
            teacher=None if student is teacher else teacher,
            resume=resume,
            train_dataset=TokenisedTexts(self.training, tokenizer, self.max_length),
            eval_dataset=held_out,
            processing_class=tokenizer,
            compute_metrics=scores_of,
            compile=self.compile,
        )
        for trainer, goes_on in stages:  # the last one is evaluated and saved
            say_decisions(trainer)
            for callback in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(callback)
            trainer.add_callback(TrainingProgress(output.console()))
            started = time.perf_counter()
            if not goes_on:
                calibrate(trainer)
            trainer.train(resume_from_checkpoint=goes_on or None)
            seconds += time.perf_counter() - started
        trainer.save_model(str(out))
        replace(trainer.recipe, teachers=self.recipe.teachers).save(out / RECIPE)
        results: dict[str, Any] = {
            "recipe": self.recipe.name,
            "steps": self.steps if self.recipe.teachers else trainer.state.global_step,
            "seconds": seconds,
            "training_rows": len(self.training),
        }
        if held_out is not None:
            metrics = trainer.evaluate()
            results |= {
                "evaluation_rows": len(held_out),
                "accuracy": metrics["eval_accuracy"],
                "macro_f1": metrics["eval_macro_f1"],
            }
        atomic_write(out / RESULTS, json.dumps(results, indent=1) + "\n")
        if held_out is not None:
            output.say(
                f"student on {len(held_out):,} rows: accuracy {results['accuracy']:.4f}, "
                f"macro-F1 {results['macro_f1']:.4f}"
            )
        output.say(f"wrote the checkpoint {out}; next: ti-fx export {out} --out student.onnx")

    def _arguments(self, out: Path) -> TrainingArguments:
        from transformers import TrainingArguments

        every = max(1, self.steps // EVALUATIONS)
        return TrainingArguments(
            output_dir=str(out),
            max_steps=self.steps,
            learning_rate=self.learning_rate,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=64,
            warmup_steps=WARM_UP,
            lr_scheduler_type="linear",
            weight_decay=WEIGHT_DECAY,
            seed=self.seed,
            data_seed=self.seed,
            train_sampling_strategy="group_by_length",
            eval_strategy="no" if self.held_out is None else "steps",
            eval_steps=every,
            save_strategy="steps",
            save_steps=every,
            save_total_limit=KEPT_CHECKPOINTS,
            logging_steps=max(1, self.steps // LOGS),
            report_to="none",
            disable_tqdm=True,
        )


def _length(asked: int | None, config: PreTrainedConfig) -> int:
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    if asked is not None and asked > limit:
        raise InputError(
            f"--max-length is {asked}, and the model takes at most {limit} tokens; give {limit} or less"
        )
    return int(min(MAX_LENGTH, limit)) if asked is None else asked


def _classifier(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a fine-tuned sequence classification model and its tokenizer.

    Raises:
        InputError: there is no such model, it is incomplete, or it has no trained classifier.
    """
    import torch
    import transformers
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    local = Path(source).exists()
    if local and not (Path(source) / "config.json").is_file():
        raise InputError(f"{source} has no config.json; give the folder of a saved Hugging Face model")
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            source, local_files_only=local, output_loading_info=True, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    except Exception as error:  # transformers, safetensors and the hub raise errors without a common base
        reason = first_line(error).rstrip(".")
        raise InputError(
            f"can't load a text classifier and its tokenizer from {source}: {reason}; give a folder that "
            "save_pretrained wrote, or a name on the hub"
        ) from error
    if loaded["missing_keys"]:
        raise InputError(
            f"{source} lacks {', '.join(sorted(loaded['missing_keys'])[:3])}: it is not fine-tuned as a classifier, "
            "and a teacher must be; fine-tune it on these labels first"
        )
    kind = getattr(model.config, "problem_type", None)
    if kind in ("regression", "multi_label_classification") or model.config.num_labels < 2:
        raise InputError(
            f"{source} has {model.config.num_labels} labels and problem type {kind}; ti-fx train does one label of "
            "several a row: use ti_fx.train.TernaryTrainer for others"
        )
    return model, tokenizer
