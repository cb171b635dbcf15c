"""ResumingTrainer writes checkpoints whole and goes on from them with the same bits."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import TrainOutput

from ti_fx.errors import CheckpointError
from ti_fx.recipe import Recipe
from ti_fx.train import checkpoint, schedule
from ti_fx.train.finished import finished_files, finished_folder
from ti_fx.train.finite import refuse_gradient, refuse_loss
from ti_fx.train.model import TernaryModel
from ti_fx.train.order import (
    EpochStart,
    RowOrder,
    SeededCollator,
    SeededRows,
    SeededStream,
    has_order,
    seeded,
)
from ti_fx.train.same_recipe import check_recipe

logger = logging.getLogger(__name__)


class ResumingTrainer(Trainer):
    """What ``transformers.Trainer`` does with checkpoints, for a ``TernaryModel``.

    Attributes:
        recipe: its phases.
        source: the model that was captured, whose config goes with the weights.
        example: the inputs that it was captured with.
    """

    model: TernaryModel
    recipe: Recipe
    source: nn.Module
    example: dict[str, Tensor]
    _saving_to: str | None = None
    _saved_step: int | None = None
    _rows: Any = None
    _order: RowOrder | None = None
    _epoch: EpochStart | None = None  # of the present epoch
    _left: EpochStart | None = None  # of the checkpoint that training goes on from

    # --- the same rows in the same order --------------------------------------------------------------------------

    def _get_dataloader(self, dataset: Any, *args: Any, **options: Any) -> Any:
        if options.get("is_training"):
            if has_order(dataset) and type(dataset).__module__.startswith(
                "datasets."
            ):  # before rows are read
                dataset = self._remove_unused_columns(dataset, description="training")
            if has_order(dataset) or self.args.world_size <= 1:
                dataset = self._rows = seeded(dataset, self._data_seed)
        return super()._get_dataloader(dataset, *args, **options)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        return SeededCollator(super()._get_collator_with_removed_columns(data_collator, description))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = train_dataset.rows if isinstance(train_dataset, SeededRows) else train_dataset
        sampler: Any = super()._get_train_sampler(rows)
        if sampler is None or isinstance(sampler, BatchRebalanceSampler):  # has an order by epoch already
            return sampler
        accelerator: Any = self.args.accelerator_config
        if isinstance(sampler, RandomSampler) and accelerator.use_seedable_sampler:  # as accelerate does
            sampler = SeedableRandomSampler(sampler.data_source, data_seed=self.args.data_seed)
        self._order = RowOrder(sampler, self._data_seed if self.args.world_size > 1 else None)
        return self._order

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        started: Any = super()._init_training_state
        resumed = resume_from_checkpoint
        epochs, batches = started(max_steps, num_update_steps_per_epoch, num_train_epochs, resumed, trial)
        self._left = None
        if resumed is not None:
            self._left = checkpoint.epoch_start(resumed, checkpoint.read_facts(resumed))
        if self._left is None or has_order(self.train_dataset):
            return epochs, batches
        # where rows have no number, Trainer takes all of training for one epoch
        since = (self.state.global_step - self._left.step) * self.args.gradient_accumulation_steps
        return self._left.epoch, 0 if self.args.ignore_data_skip else since

    def _run_epoch(self, **options: Any) -> None:  # type: ignore[override]  # Trainer calls it by keywords
        epoch, left = options["epoch"], self._left
        inside = options["steps_trained_in_current_epoch"] > 0 and not self.args.ignore_data_skip
        goes_on = left is not None and epoch == options["epochs_trained"] and inside
        self._epoch = left if goes_on else EpochStart(epoch, self.state.global_step)
        if isinstance(self._rows, SeededStream):
            self._rows.set_epoch(epoch)
        if self._order is not None:
            self._order.set_epoch(epoch)
            if left is not None and left.state is not None and goes_on:
                self._order.draw_again(left.state)
        run: Any = super()._run_epoch
        run(**options)

    def _epoch_start(self) -> EpochStart | None:
        if self._epoch is None or self._order is None:
            return self._epoch
        return replace(self._epoch, state=self._order.start)

    def _evaluate(self, *args: Any, **options: Any) -> Any:
        """Evaluate; after a checkpoint of this step no random number is drawn, as its reader would lack that."""
        with torch.random.fork_rng(devices=[], enabled=self._saved_step == self.state.global_step):
            return super()._evaluate(*args, **options)

    # --- numbers ----------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Train as Trainer does, and stop at a loss that is not finite."""
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not bool(loss.isfinite()):
            refuse_loss(loss, self.model, self._prepare_inputs(inputs), self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm_of: Any = super()._get_grad_norm
        norm = norm_of(model, grad_norm)
        if norm is not None and self.accelerator.scaler is None:  # a scaler leaves such a step out
            refuse_gradient(norm, self.model, self.state.global_step + 1)
        return norm

    # --- checkpoints ----------------------------------------------------------------------------------------------

    @property
    def _run_folder(self) -> str:
        return str(self.args.output_dir)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; ``resume_from_checkpoint=True`` takes the newest finished checkpoint in the output folder.

        From the checkpoint of a finished run only its weights and its state are loaded: no step is trained, nothing is
        written, and the result has no metrics and a loss that is NaN.

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
            check_recipe(resume_from_checkpoint, checkpoint.read_facts(resume_from_checkpoint), self.recipe)
            state = checkpoint.training_state(resume_from_checkpoint)
            steps = self._total_steps()
            if state.global_step >= steps:
                return self._finished(resume_from_checkpoint, state)
            self._check_steps(resume_from_checkpoint, state, steps)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _total_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def _check_steps(self, folder: str, state: TrainerState, steps: int) -> None:
        """Say that training is longer or shorter than it was; refuse it where the phases would be others."""
        if state.max_steps == steps:
            return
        trained = checkpoint.read_facts(folder)["position"].get("phase")
        now = schedule.at(schedule.spans(self.recipe.phases(), steps), state.global_step - 1).phase.name
        moves = any(one.moves for one in self.recipe.phases())
        blends = ", and so is what its curves move" if moves else ""
        changed = f"{folder} was trained for {state.max_steps} steps in all, and this is for {steps}"
        if trained != now:
            raise CheckpointError(
                f"{changed}: step {state.global_step} was of phase {trained!r} and would be of {now!r}; resume with "
                f"max_steps={state.max_steps}, or begin anew"
            )
        logger.warning(
            f"{changed}: from step {state.global_step} on the learning rate is that of {steps} steps{blends}"
        )

    def _finished(self, folder: str, state: TrainerState) -> TrainOutput:
        self._load_from_checkpoint(folder)
        self.state = state
        self.model.enter(self.recipe.phases()[-1])
        if self.args.load_best_model_at_end:
            self._load_best_model()
        logger.warning(f"{folder} is of a finished run (step {state.global_step}); nothing is left to train")
        return TrainOutput(state.global_step, math.nan, {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        facts = checkpoint.read_facts(resume_from_checkpoint)
        checkpoint.restore(self.model, resume_from_checkpoint, facts)
        self.model.compile_at(facts["position"].get("compiled", {}))
        if blended := facts["position"].get("shares"):
            self.model.enter(
                next(one for one in self.recipe.phases() if one.name == facts["position"]["phase"])
            )
            self.model.set_shares(blended)

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
        if isinstance(
            self.source, PreTrainedModel
        ):  # a wrapper's weights have other names than its config says
            self.source.config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        blended, learned = self.model.shares(), self.model.learned()
        torch.save(self.args, folder / "training_args.bin")
        gathered = None
        if state_dict is not None:
            gathered = {name: value for name, value in state_dict.items() if self.model.is_students(name)}
        checkpoint.save(
            folder,
            self.model,
            example=self.example,
            source=checkpoint.source_facts(self.source),
            position={
                "step": self.state.global_step,
                "phase": self.model.phase.name,
                "compiled": self.model.compiled_shapes(),
                **({"shares": blended} if blended else {}),
                **({"learned": learned} if learned else {}),
            },
            weights=gathered,
            epoch=self._epoch_start(),
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
        self._saved_step = self.state.global_step
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
