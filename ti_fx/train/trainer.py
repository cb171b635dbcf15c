"""TernaryTrainer adds phases, losses by name, restarts and verified checkpoints to transformers.Trainer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import TrainingArguments

from ti_fx.errors import DataError, InputError
from ti_fx.frontend.capture import capture
from ti_fx.frontend.dynamic_sizes import Dynamic
from ti_fx.ir.facts import facts
from ti_fx.ir.pipeline import Report
from ti_fx.ir.roles import LEARNED_PREFIXES
from ti_fx.measure.choose import Choice, resolve
from ti_fx.passes import Calibrate
from ti_fx.recipe import Recipe, chosen_recipe
from ti_fx.train import rows, schedule
from ti_fx.train.arguments import require_arguments
from ti_fx.train.blending import TASK_SHARE
from ti_fx.train.calibration import calibrated, is_rounded, require_calibration
from ti_fx.train.model import Compile, TernaryModel
from ti_fx.train.objective_trainer import ObjectiveTrainer
from ti_fx.train.resuming import ResumingTrainer
from ti_fx.train.source import ready_source
from ti_fx.train.untrained import prepare_to_train, require_trained

logger = logging.getLogger(__name__)

AUTO_COMPILE_STEPS = 2000  # on a CPU: a phase this long repays its compilation (benchmarks/train_step.py)


class TernaryTrainer(ObjectiveTrainer, ResumingTrainer):
    """Train a ternary student by a recipe, with everything else as in ``transformers.Trainer``.

    Differences: ``model`` is captured and prepared here; the phase, and what its curves move, follow the optimiser
    step; each loss is logged by name (``loss_logits``, ...) beside the weighted sum, and so are each blended point's
    share (``blend_layer``) and the weights of losses that move (``weight_logits``, ``log_variance_logits``); evaluation
    and prediction run the stripped student; a restart clears the optimiser's state in place and begins the
    learning-rate schedule anew; checkpoints are written whole.
    """

    model: TernaryModel

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe | str | Path,
        args: TrainingArguments | None = None,
        *,
        teacher: nn.Module | None = None,
        example: Mapping[str, Any] | None = None,
        dynamic: Dynamic = "auto",
        compile: Literal["on", "off", "auto"] = "auto",
        evaluate_distillation: bool = False,
        **options: Any,
    ) -> None:
        """Capture, prepare and wrap the model.

        Args:
            model: the trained full-precision model (its Parameters become the student's), or a graph from
                ``ti_fx.capture``, prepared by this recipe or not at all. ``torch.compile``, DDP and their like are
                taken off it, and half precision becomes float32, which a warning says.
            recipe: a Recipe, a preset's name, or the path of a recipe's file.
            args: as for Trainer. ``max_steps`` left out takes the recipe's ``steps``. Use ``compile=`` here, not
                ``torch_compile``.
            teacher: a module to take the teacher's values from; None: the model's own values.
            example: inputs to capture with; None: the first rows of ``train_dataset``, collated.
            dynamic: which sizes of the inputs are left open, as for ``ti_fx.capture``.
            compile: compile each phase's graph. ``auto``: on an accelerator, or for phases of many steps.
            evaluate_distillation: evaluation also reports ``eval_distillation`` and each loss by name.
            options: train_dataset, eval_dataset, data_collator, processing_class, compute_metrics, callbacks, ...

        Raises:
            InputError, DataError, CaptureError, PreconditionError: with one line that says what to do.
        """
        # A copy: what is settled here must not reach the next trainer that is given the same arguments.
        args = TrainingArguments(output_dir="trainer_output") if args is None else copy.copy(args)
        args.logging_nan_inf_filter = False  # it leaves out of the mean what is no number
        self.recipe = chosen_recipe(recipe)
        if self.recipe.teachers:
            raise InputError(
                f"recipe {self.recipe.name!r} is a chain of {len(self.recipe.chain())}, and a trainer trains one: take "
                "those of ti_fx.train.trainers, in turn"
            )
        model = ready_source(model)
        require_arguments(args, self.recipe, model)
        self.choice: Choice | None = None  # what was measured for the encoding "auto"
        self.report: Report | None = (
            None  # of the passes that prepared the graph, unless that was done before
        )
        self.calibration: Calibrate | None = None  # of the recipe, with its report, once it was done
        self.source = model
        label_names = (
            list(args.label_names) if args.label_names is not None else rows.label_names(model, options)
        )
        options["data_collator"] = options.get("data_collator") or rows.collator(
            options.get("processing_class")
        )
        prepared, self.example = self._prepare(model, teacher, example, args, label_names, options, dynamic)
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
        self._moved: dict[str, float] = {}  # of the last step, what the phase's curves moved
        self._set_objective(prepared, options)

    def _prepare(
        self,
        model: nn.Module,
        teacher: nn.Module | None,
        example: Mapping[str, Any] | None,
        args: TrainingArguments,
        label_names: Sequence[str],
        options: dict[str, Any],
        dynamic: Dynamic,
    ) -> tuple[GraphModule, dict[str, Tensor]]:
        if example is None:
            example = rows.first_rows(model, options, label_names, args.remove_unused_columns)
        example = {name: _move(value, args.device) for name, value in example.items()}
        if isinstance(model, GraphModule):
            if dynamic != "auto":
                raise InputError(
                    f"dynamic={dynamic!r} is for a model, and this graph was captured already; give it to ti_fx.capture"
                )
            gm = model
        else:
            model.to(args.device)
            gm = capture(model, example, dynamic=dynamic)
        if facts(gm).recipe is None:
            self.recipe, self.choice = resolve(self.recipe, gm)
            self.report = prepare_to_train(gm, self.recipe, teacher)
        elif facts(gm).recipe == self.recipe.to_dict():
            require_trained(gm, self.recipe)
        else:
            raise InputError(
                "the graph was prepared by another recipe; capture the model again, or pass that recipe"
            )
        if self.recipe.calibrate is not None:
            require_calibration(gm, self.recipe.calibrate)
        return gm, {name: value for name, value in example.items() if isinstance(value, Tensor)}

    def calibrate(self) -> None:
        """Set the ternary weights as the recipe's ``calibrate`` says, which ``train`` does before its first step.

        Weights that are not the teacher's (a start of the student's own, trained ones) are left, which a warning says.

        Raises:
            DataError: there are no rows, or they hold what is no number.
        """
        one, gm = self.recipe.calibrate, self.model.prepared()
        if one is None or self.calibration is not None:
            return
        if not is_rounded(gm):
            logger.warning("the student begins with weights of its own, which are not calibrated")
            return
        if self.train_dataset is None:
            raise DataError("there is no data to calibrate with; pass train_dataset=")
        self.calibration = calibrated(gm, one, self.train_dataset, self._inputs_of, self._data_seed)

    def _inputs_of(self, some: list[Any]) -> dict[str, Any]:
        names, options = self.label_names, {"data_collator": self.data_collator}
        batch = rows.collated(self.source, some, options, names, self.args.remove_unused_columns)
        inputs = {name: value for name, value in batch.items() if name not in {*names, *rows.LABELS}}
        labels = rows.labels_of(self.source, batch, names) or {}
        made = rows.with_decoder_inputs(self.source, inputs, labels)
        return {name: _move(value, self.args.device) for name, value in made.items()}

    # --- the loop: phases, losses, restarts -------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Calibrate if the recipe says so, unless training goes on from a checkpoint, then train as Trainer does."""
        if not resume_from_checkpoint:
            self.calibrate()
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Enter the phase of the current optimiser step, then train as Trainer does."""
        span = schedule.at(self._spans, self.state.global_step)
        self.model.enter(span.phase)
        if span.phase.restart and self.state.global_step == span.start and span.start:
            assert self.optimizer is not None
            self.optimizer.state.clear()  # in place: accelerate keeps its optimiser, DDP its parameters
        self._moved = self.model.move(self.state.global_step - span.start, span.end - span.start)
        self.objective.share = self._moved.get(TASK_SHARE, 1.0)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the phase, what its curves move and what is learned of the losses' weights, and each loss by name."""
        if "loss" in logs:
            logs.update(self._moved)
            logs.update({f"log_variance_{term}": value for term, value in self.model.learned().items()})
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
        """Decay matrices; not biases and norms, which have one dimension, and not what quantisers learn."""
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1 and not name.startswith(LEARNED_PREFIXES)
        ]

    def student(self) -> GraphModule:
        """Return the stripped student, in eval mode, on the trained tensors: ready for ``Pack`` and ``to_onnx``."""
        return self.model.student().eval()

    # --- data ---------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        columns: Any = [*self.model.inputs, *self.label_names, *rows.LABELS]
        self._signature_columns = columns


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
