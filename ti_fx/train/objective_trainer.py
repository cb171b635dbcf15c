"""ObjectiveTrainer computes the losses of a prepared graph in training and evaluation, on one device or several."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import Trainer

from ti_fx.errors import InputError
from ti_fx.train import rows
from ti_fx.train.model import TernaryModel
from ti_fx.train.objective import Batch, Objective, shifts_labels
from ti_fx.train.shares import count_rows
from ti_fx.train.sums import Distillation, StepLosses
from ti_fx.train.task_loss import leaves, single

LOG = logging.getLogger(__name__)


class ObjectiveTrainer(Trainer):
    """A Trainer whose loss is that of a prepared graph, with the task's where its recipe gives that a weight.

    The losses of an optimiser step's micro-batches, on all devices, add up to the loss of the batch that they make.
    """

    model: TernaryModel
    loss_is_scaled_for_ga = True  # a micro-batch's loss is its part of the whole batch's
    source: nn.Module
    objective: Objective
    evaluate_distillation: bool

    def _set_objective(self, prepared: GraphModule, options: Mapping[str, Any]) -> None:
        """Settle what is minimised; refuse a recipe with a task's loss where there is none, or no label."""
        self._loss_shifts_labels = shifts_labels(self.source)
        self.objective = Objective(prepared, self.source, self.compute_loss_func)
        self.objective.smoother = self.label_smoother
        self._step = StepLosses()
        self._distillation = Distillation(self.objective.counts)
        self._without_labels = False  # whether the objective is one's own, of outputs alone
        if not self.objective.weight:
            return
        first = rows.first_batch(self.source, options, self.label_names, self.args.remove_unused_columns)
        if first is not None:
            batch = self._batch(self._prepare_inputs(dict(first)))
            self._without_labels = self.compute_loss_func is not None and batch.labels is None
            self.objective.require_task(batch)
            self.objective.settle(batch)

    # --- training ---------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect the micro-batches of an optimiser step, and count what their losses are means over."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step.begin(self.objective.whole([self._batch(one) for one in samples], *self._averaged()))
        return samples, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted sum of the phase's losses, with the task loss if the recipe gives it a weight.

        Within ``train`` it is the micro-batch's part of the whole batch's loss: those of an optimiser step add up.
        """
        batch = self._batch(inputs)
        result = model(**batch.inputs)
        whole = self._step.whole if self.model.training else None
        loss, losses = self.objective.loss(result, batch, whole, num_items_in_batch)
        if self.model.training:
            self._step.add(losses)
        return (loss, result["outputs"]) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each loss by name, averaged since the last log and over the devices, and the phase."""
        if "loss" in logs and (means := self._step.means(self._mean_over_devices)):
            logs.update({f"loss_{name}": value for name, value in means.items()})
        super().log(logs, start_time)

    # --- evaluation on the stripped student -------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Run the student; the loss is the model's own on labels, where it has one."""
        batch = self._batch(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**batch.inputs)
            loss = self._evaluated_loss(outputs, batch, inputs)
            if self.evaluate_distillation:
                with self.accelerator.autocast():
                    self._distillation.add(self.model, batch, self._own_rows(batch))
        if prediction_loss_only:
            return loss, None, None
        if ignore_keys is None:
            ignore_keys = getattr(
                getattr(self.source, "config", None), "keys_to_ignore_at_inference", ["past_key_values"]
            )
        ignored = {*ignore_keys, "loss"}
        kept = [
            value.detach()
            for name, value in leaves(outputs).items()
            if name not in ignored and name.split(".")[0] not in ignored
        ]
        labels = None if batch.labels is None else single(tuple(batch.labels.values()))
        return loss, single(tuple(kept)), labels

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, and report the distillation losses if asked for."""
        self._distillation = Distillation(self.objective.counts)
        result = super().evaluation_loop(*args, **kwargs)
        if (
            self.compute_metrics is not None
            and result.label_ids is None
            and "Evaluation" in (*args, *kwargs.values())
        ):
            LOG.warning(
                "compute_metrics was given, and the rows have no labels in %s; name their column in "
                "TrainingArguments(label_names=[...])",
                ", ".join(self.label_names),
            )
        prefix = kwargs.get("metric_key_prefix", "eval")
        for name, value in self._distillation.metrics(self._sum_over_devices).items():
            assert result.metrics is not None
            result.metrics[f"{prefix}_distillation{name}"] = value
        return result

    def _evaluated_loss(self, outputs: Any, batch: Batch, inputs: Mapping[str, Any]) -> Tensor | None:
        if batch.labels is None and not (self._without_labels or self.objective.returns_loss):
            return None
        items = self._get_num_items_in_batch([inputs], self.args.device)
        devices, _ = self._averaged()
        if (why := self.objective.reason) is None:
            try:
                loss: Tensor = self.objective.evaluate(outputs, batch, items).detach().mean()
                return loss if items is None or self.compute_loss_func is None else loss * devices
            except InputError:
                why = self.objective.reason
                if why is None:
                    raise
                LOG.warning("no evaluation loss: %s", why)
        return None

    # --- several devices --------------------------------------------------------------------------------------------

    def _averaged(self) -> tuple[int, Callable[[Tensor], Tensor]]:
        """Return how many devices' gradients are averaged as one batch's, and what adds a tensor over them."""
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            return self.args.world_size, self._sum_over_devices
        return 1, lambda values: values

    def _sum_over_devices(self, values: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return values
        gathered: Tensor = self.accelerator.gather(values[None].to(self.args.device))
        return gathered.sum(0).cpu()

    def _mean_over_devices(self, values: Tensor) -> Tensor:
        mean: Tensor = self._sum_over_devices(values) / int(self.args.world_size)
        return mean

    def _own_rows(self, batch: Batch) -> int:
        """Return how many rows of an evaluation batch count: accelerate fills the last ones of all devices up."""
        rows_here = count_rows(batch.inputs)
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return rows_here
        left = int(state.remainder) - int(self.args.process_index) * rows_here
        return min(max(left, 0), rows_here)

    # --- labels -------------------------------------------------------------------------------------------------------

    def _batch(self, inputs: Mapping[str, Any]) -> Batch:
        """Tell inputs and labels of a batch apart, and make those inputs that the model's forward makes of labels."""
        labels = rows.labels_of(self.source, inputs, self.label_names)
        features = {name: inputs[name] for name in self.model.inputs if name in inputs}
        return Batch(rows.with_decoder_inputs(self.source, features, labels or {}), labels)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count as Trainer does, whatever the labels' column is called."""
        if len(self.label_names) == 1:
            (name,) = self.label_names
            batch_samples = [{"labels": one[name]} if name in one else one for one in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)
