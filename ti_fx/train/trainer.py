"""TernaryTrainer adds phases, losses by name, restarts and verified checkpoints to transformers.Trainer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import TrainingArguments

from ti_fx.errors import CheckpointError, InputError
from ti_fx.frontend.capture import capture
from ti_fx.ir.facts import facts
from ti_fx.ir.roles import TEACHER_PREFIX
from ti_fx.measure.choose import Choice, resolve
from ti_fx.recipe import Recipe
from ti_fx.train import checkpoint, rows, schedule
from ti_fx.train.arguments import require_arguments
from ti_fx.train.finished import finished_files, finished_folder
from ti_fx.train.model import Compile, TernaryModel
from ti_fx.train.objective_trainer import ObjectiveTrainer

AUTO_COMPILE_STEPS = 2000  # on a CPU: a phase this long repays its compilation (benchmarks/train_step.py)


class TernaryTrainer(ObjectiveTrainer):
    """Train a ternary student by a recipe, with everything else as in ``transformers.Trainer``.

    Differences: ``model`` is captured and prepared here; the phase follows the optimiser step; each loss is logged by
    name (``loss_logits``, ...) beside the weighted sum; evaluation and prediction run the stripped student; a restart
    clears the optimiser's state in place and begins the learning-rate schedule anew; checkpoints are written whole.
    """

    model: TernaryModel
    _saving_to: str | None = None

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe | str,
        args: TrainingArguments | None = None,
        *,
        teacher: nn.Module | None = None,
        example: Mapping[str, Any] | None = None,
        compile: Literal["on", "off", "auto"] = "auto",
        evaluate_distillation: bool = False,
        **options: Any,
    ) -> None:
        """Capture, prepare and wrap the model.

        Args:
            model: the trained full-precision model (its Parameters become the student's), or a graph from
                ``ti_fx.capture``, prepared by this recipe or not at all.
            recipe: a Recipe or a preset's name.
            args: as for Trainer. ``max_steps`` left out takes the recipe's ``steps``. Use ``compile=`` here, not
                ``torch_compile``.
            teacher: a module to take the teacher's values from; None: the model's own values.
            example: inputs to capture with; None: the first rows of ``train_dataset``, collated.
            compile: compile each phase's graph. ``auto``: on an accelerator, or for phases of many steps.
            evaluate_distillation: evaluation also reports ``eval_distillation`` and each loss by name.
            options: train_dataset, eval_dataset, data_collator, processing_class, compute_metrics, callbacks, ...

        Raises:
            InputError, DataError, CaptureError, PreconditionError: with one line that says what to do.
        """
        # A copy: what is settled here must not reach the next trainer that is given the same arguments.
        args = TrainingArguments(output_dir="trainer_output") if args is None else copy.copy(args)
        self.recipe = Recipe.preset(recipe) if isinstance(recipe, str) else recipe
        require_arguments(args, self.recipe, model)
        self.choice: Choice | None = None  # what was measured for the encoding "auto"
        self.source = model
        label_names = (
            list(args.label_names) if args.label_names is not None else rows.label_names(model, options)
        )
        options["data_collator"] = options.get("data_collator") or rows.collator(
            options.get("processing_class")
        )
        prepared, self.example = self._prepare(model, teacher, example, args, label_names, options)
        if args.max_steps <= 0 and self.recipe.steps is not None:
            args.max_steps = self.recipe.steps
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False  # there is no accelerator to copy to
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # a phase leaves some parameters without a gradient
        wrapped = TernaryModel(prepared, self.recipe, compile=compile_choice(compile, args, self.recipe))
        if hasattr(model, "config"):
            wrapped.config = model.config
        wrapped.main_input_name = main_input(model, wrapped.inputs)
        super().__init__(model=wrapped, args=args, **options)
        self.label_names = label_names
        self.evaluate_distillation = evaluate_distillation
        self._spans: tuple[schedule.Span, ...] = ()
        self._set_objective(prepared, options)

    def _prepare(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        example: Mapping[str, Any] | None,
        args: TrainingArguments,
        label_names: Sequence[str],
        options: dict[str, Any],
    ) -> tuple[GraphModule, dict[str, Tensor]]:
        if example is None:
            example = rows.first_rows(model, options, label_names, args.remove_unused_columns)
        example = {name: _move(value, args.device) for name, value in example.items()}
        if isinstance(model, GraphModule):
            gm = model
        else:
            model.to(args.device)
            gm = capture(model, example)
        if facts(gm).recipe is None:
            self.recipe, self.choice = resolve(self.recipe, gm)
            self.recipe.prepare(gm, teacher=teacher)
        if facts(gm).recipe != self.recipe.to_dict():
            raise InputError(
                "the graph was prepared by another recipe; capture the model again, or pass that recipe"
            )
        return gm, {name: value for name, value in example.items() if isinstance(value, Tensor)}

    # --- the loop: phases, losses, restarts -------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Enter the phase of the current optimiser step, then train as Trainer does."""
        span = schedule.at(self._spans, self.state.global_step)
        self.model.enter(span.phase)
        if span.phase.restart and self.state.global_step == span.start and span.start:
            assert self.optimizer is not None
            self.optimizer.state.clear()  # in place: accelerate keeps its optimiser, DDP its parameters
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the phase, and each loss by name."""
        if "loss" in logs:
            logs["phase"] = schedule.at(self._spans, max(self.state.global_step - 1, 0)).phase.name  # type: ignore[assignment]
        super().log(logs, start_time)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Lay out the phases and make one schedule that begins anew at each restart."""
        self._spans = schedule.spans(self.recipe.phases(), num_training_steps)
        if not any(span.phase.restart and span.start for span in self._spans):
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            factor = schedule.learning_rate_factor(self._spans, self.args)
            inner: Any = self.optimizer if optimizer is None else optimizer
            inner = getattr(
                inner, "optimizer", inner
            )  # accelerate's wrapper is no torch Optimizer to LambdaLR
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(inner, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decay matrices; not biases and norms, which have one dimension."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

    def student(self) -> GraphModule:
        """Return the stripped student, in eval mode, on the trained tensors: ready for ``Pack`` and ``to_onnx``."""
        return self.model.student().eval()

    # --- data and checkpoints ---------------------------------------------------------------------------------------

    @property
    def _run_folder(self) -> str:
        return str(self.args.output_dir)

    def _set_signature_columns_if_needed(self) -> None:
        columns: Any = [*self.model.inputs, *self.label_names, *rows.LABELS]
        self._signature_columns = columns

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; ``resume_from_checkpoint=True`` takes the newest finished checkpoint in the output folder.

        Raises:
            CheckpointError: nothing to resume from, or it belongs to another model, teacher or recipe.
        """
        if resume_from_checkpoint is True:
            found = checkpoint.last_finished(self._run_folder)
            if found is None:
                raise CheckpointError(f"{self._run_folder} holds no finished checkpoint to resume from")
            resume_from_checkpoint = str(found)
        elif isinstance(resume_from_checkpoint, str):
            checkpoint.read_facts(resume_from_checkpoint)
        if resume_from_checkpoint:
            checkpoint.check_training_state(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        facts = checkpoint.read_facts(resume_from_checkpoint)
        checkpoint.restore(self.model, resume_from_checkpoint, facts)
        self.model.compile_at(facts["position"].get("compiled", {}))

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        with checkpoint.readable(checkpoint_folder):
            super()._load_optimizer_and_scheduler(checkpoint_folder)

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        with checkpoint.readable(checkpoint_folder):
            super()._load_rng_state(checkpoint_folder)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None:
            raise CheckpointError("no best checkpoint was saved; set save_strategy as eval_strategy")
        checkpoint.restore(self.model, best, checkpoint.read_facts(best))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self._run_folder)
        if not self.args.should_save:
            return
        config: Any = getattr(self.source, "config", None)
        if config is not None:
            config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")
        gathered = None
        if state_dict is not None:
            gathered = {
                name: value for name, value in state_dict.items() if not name.startswith(TEACHER_PREFIX)
            }
        checkpoint.save(
            folder,
            self.model,
            example=self.example,
            source=checkpoint.source_facts(self.source),
            position={
                "step": self.state.global_step,
                "phase": self.model.phase.name,
                "compiled": self.model.compiled_shapes(),
            },
            weights=gathered,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a checkpoint to evaluate or export from, whole or not at all."""
        target = Path(output_dir if output_dir is not None else self._run_folder)
        if _internal_call or not self.args.should_save:
            super().save_model(str(target), _internal_call=True)
            return
        with finished_files(target, checkpoint.DESCRIPTION) as temporary:
            super().save_model(str(temporary), _internal_call=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save into a temporary folder and rename it, so that a checkpoint is whole or not there."""
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            saving = finished_folder(
                run / name, owner=self.args.should_save, barrier=self.accelerator.wait_for_everyone
            )
            with saving as temporary:
                self._saving_to = str(temporary.parent)
                super()._save_checkpoint(model, trial)
                if self.state.best_model_checkpoint == str(temporary):
                    self.state.best_model_checkpoint = str(run / name)
                    if self.args.should_save:
                        self.state.save_to_json(str(temporary / checkpoint.TRAINER_STATE))
        finally:
            self._saving_to = None
            self.args.save_total_limit = limit
        if self.args.should_save and limit is not None:
            from transformers.trainer_utils import rotate_checkpoints

            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_to or str(super()._get_output_dir(trial))


def compile_choice(wanted: str, args: TrainingArguments, recipe: Recipe) -> Compile:
    """Return whether the phases are compiled: as wanted, and for ``auto`` where training is long enough to gain by it.

    Raises:
        InputError: ``wanted`` is none of on, off and auto.
    """
    if wanted == "on":
        return "on"
    if wanted == "off":
        return "off"
    if wanted != "auto":
        raise InputError(f"compile is {wanted!r}; use 'on', 'off' or 'auto'")
    if args.device.type != "cpu":
        return "on"
    return "on" if args.max_steps >= AUTO_COMPILE_STEPS * len(recipe.phases()) else "off"


def main_input(model: nn.Module, inputs: Sequence[str]) -> str:
    """Return the input whose tokens Trainer counts, and that metrics may ask for."""
    name = str(getattr(model, "main_input_name", "input_ids"))
    return name if name in inputs else inputs[0]


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
