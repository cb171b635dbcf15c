"""An Objective is what a step minimises: the graph's losses and the task's, micro-batches weighed by their shares."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ti_fx.errors import DataError, InputError, first_line
from ti_fx.ir.facts import facts
from ti_fx.ir.outputs import model_outputs, named_leaves
from ti_fx.numerics import losses
from ti_fx.train.shares import PartCounts, count_rows
from ti_fx.train.task_loss import LOSS, TaskLoss, leaves, own_loss, single
from ti_fx.train.task_share import SUM, Rule, rule_of

LOG = logging.getLogger(__name__)
TASK = "task"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        inputs: what the graph takes, by name. labels: by the model's own names, None where the rows have none.
    """

    inputs: Tensors
    labels: Tensors | None


@dataclass(frozen=True)
class Whole:
    """The counts of a whole batch: all micro-batches of an optimiser step, on all devices that are averaged over.

    Attributes:
        parts: how many entries each part of the graph's loss is a mean over. task: how many labels the task's loss is.
        devices: whose gradients are averaged afterwards.
    """

    parts: Tensor
    task: float
    devices: int


class Objective:
    """The losses of one prepared graph, of its source model and of what Trainer was given.

    Attributes:
        weight: of the task's loss, 0 where it is not trained.
        share: of that weight, at the present step.
        given: Trainer's ``compute_loss_func``. smoother: Trainer's label smoother, for ``label_smoothing_factor``.
        returns_loss: whether the model returns its loss without labels (CLIP with ``return_loss=True``).
    """

    def __init__(self, prepared: GraphModule, source: nn.Module, given: Callable[..., Tensor] | None) -> None:
        self.counts = PartCounts(prepared)
        self.source = source
        self.weight = facts(prepared).task or 0.0
        self.share = 1.0
        self.given = given
        self.smoother: Callable[..., Tensor] | None = None
        self.returns_loss = LOSS in named_leaves(model_outputs(prepared))
        self._own: TaskLoss | str | None = None
        self._rule: Rule | None = None
        self._is_divided: bool | None = None

    # --- training ---------------------------------------------------------------------------------------------------

    def require_task(self, batch: Batch) -> None:
        """Find the model's own loss now.

        Raises:
            InputError: it has none that is a function of outputs and labels; says why.
            DataError: the rows have no labels.
        """
        if self.given is not None or self.returns_loss:
            return
        self._labels(batch)
        if self.smoother is not None:
            return
        try:
            found = self._find(batch)
        except DataError:
            return  # labels that the model can't take: the first step says so
        if isinstance(found, str):
            raise InputError(f"distill{{task}} needs the model's loss: {found}")

    def whole(self, batches: Sequence[Batch], devices: int, add: Callable[[Tensor], Tensor]) -> Whole | None:
        """Return the counts of the whole batch that these micro-batches are; None where there is but one.

        Args:
            batches: of this device.
            devices: how many devices' gradients are averaged.
            add: adds a tensor's values over these devices.
        """
        if not batches or (len(batches) == 1 and devices == 1):
            return None
        if self.weight and self.returns_loss:
            LOG.warning("the loss that %s returns counts as a mean over rows", type(self.source).__name__)
        parts = torch.stack([self.counts.of(batch.inputs) for batch in batches]).sum(0)
        task = sum(self._count(batch) for batch in batches)
        counted = add(torch.cat([parts, torch.tensor([task], dtype=torch.float64)]))
        return Whole(counted[:-1], float(counted[-1]), devices)

    def loss(
        self, result: Mapping[str, Any], batch: Batch, whole: Whole | None, items: Tensor | int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a micro-batch's part of the whole batch's loss, and of each loss by name.

        Args:
            result: what the phase's graph returned.
            batch: what it was given.
            whole: the counts of the whole batch; None: this is all of it.
            items: Trainer's ``num_items_in_batch``, for its ``compute_loss_func``.
        """
        if whole is None:
            loss, found = result["loss"], dict(result["losses"])
        else:
            shares = self.counts.of(batch.inputs) * whole.devices / whole.parts.clamp(min=1)
            loss, found = self._sum(result, shares.tolist())
        if self.weight:
            found[TASK] = self._task(result["outputs"], batch, whole, items)
            loss = loss + self.weight * self.share * found[TASK]
        return loss, found

    def _sum(self, result: Mapping[str, Any], shares: Sequence[float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the parts as the graph does, each times its share."""
        terms: dict[str, list[Tensor]] = {}
        weights: dict[str, float | Tensor] = {}
        first: dict[
            str, float
        ] = {}  # of a learned variance a micro-batch adds what it has of the term's first part
        moved, learned = result.get("weights", {}), result.get("log_variances", {})
        values = [value for parts in result["parts"].values() for value in parts]
        for part, value, share in zip(self.counts.parts, values, shares, strict=True):
            terms.setdefault(part.term, []).append(value * share)
            weights[part.term] = moved.get(part.term, part.weight)
            first.setdefault(part.term, share)
        found = {term: losses.total(values) for term, values in terms.items()}
        if not found:
            return result["loss"], {}
        added = [
            losses.learned(value, learned[term], first[term]) if term in learned else value
            for term, value in found.items()
        ]
        return losses.weighted(added, list(weights.values())), found

    def _task(self, outputs: Any, batch: Batch, whole: Whole | None, items: Tensor | int | None) -> Tensor:
        if self.given is not None:
            value = self._call(outputs, batch, items)
            if whole is None:
                return value
            if items is not None and self._divides(outputs, batch, items, value):
                return value * whole.devices
            return self._shared(value, outputs, batch, whole)
        if whole is not None and self.smoother is not None:
            return self._smoothed(outputs, batch, whole.task) * whole.devices
        value = self.evaluate(outputs, batch, items)
        return value if whole is None else self._shared(value, outputs, batch, whole)

    def _shared(self, value: Tensor, outputs: Any, batch: Batch, whole: Whole) -> Tensor:
        """Return a mean times its share; a mean over no labels is no number, and its part is 0."""
        share = self._share(batch, whole)
        if share:
            return value * share
        numbers = [leaf.sum() for leaf in leaves(outputs).values() if leaf.is_floating_point()]
        return 0.0 * losses.total(numbers)  # with gradients, which are 0

    def _share(self, batch: Batch, whole: Whole) -> float:
        if self._rule == SUM:
            return float(whole.devices)
        return self._count(batch) * whole.devices / max(whole.task, 1.0)

    def _count(self, batch: Batch) -> float:
        """Return how many labels the task's loss of a micro-batch is a mean over."""
        if not self.weight:
            return 0.0
        if batch.labels is None or self.returns_loss:
            return float(count_rows(batch.inputs))
        if self._rule is None:
            self._rule = self._measured_rule(batch)
        return self._rule.count(batch.labels)

    def settle(self, batch: Batch) -> None:
        """Measure on a few rows what the task's loss is a mean over, if they tell; else the first step's rows must."""
        if self.weight and batch.labels is not None and not self.returns_loss:
            with suppress(
                DataError, InputError
            ):  # the step that meets these labels says what is wrong with them
                self._rule = self._found_rule(batch)

    def _found_rule(self, batch: Batch) -> Rule | None:
        if self.given is not None or self.smoother is not None:
            return Rule.labels(shifted=is_causal(self.source))
        loss = self._find(batch)
        return rule_of(self.source, loss, *self._placed(batch, 2)) if isinstance(loss, TaskLoss) else None

    def _measured_rule(self, batch: Batch) -> Rule:
        found = self._found_rule(batch)
        if found is None:
            LOG.warning(
                "the loss of %s over two rows is no mean over labels or rows: with several micro-batches or devices "
                "it is the mean of theirs",
                type(self.source).__name__,
            )
        return found or Rule.rows()

    # --- the task's loss --------------------------------------------------------------------------------------------

    def evaluate(self, outputs: Any, batch: Batch, items: Tensor | int | None = None) -> Tensor:
        """Return the task's loss of a batch, as a mean over its labels.

        Raises:
            InputError: there is none; says why.
        """
        if self.given is not None:
            return self._call(outputs, batch, items)
        if self.smoother is not None:
            return self._smoothed(outputs, batch, None)
        if self.returns_loss:
            return leaves(outputs)[LOSS]
        found = self._find(batch)
        if isinstance(found, str):
            raise InputError(found)
        return found(outputs, self._labels(batch), batch.inputs)

    @property
    def reason(self) -> str | None:
        """Why the model has no loss of its own, once that was asked."""
        return self._own if isinstance(self._own, str) else None

    def _find(self, batch: Batch) -> TaskLoss | str:
        """Find the model's own loss on the first two rows of a batch; a text says why there is none."""
        if self._own is None:
            try:
                self._own = own_loss(self.source, *self._placed(batch, 2))
            except InputError as error:
                self._own = str(error)
        return self._own

    def _placed(self, batch: Batch, rows: int) -> tuple[Tensors, Tensors]:
        """Return inputs and labels of the first rows, on the model's device; of all where they have not as many."""
        labels = self._labels(batch)
        counts = {len(value) if value.dim() else 0 for value in (*batch.inputs.values(), *labels.values())}
        end = rows if len(counts) == 1 else None
        device = next((value.device for value in self.source.parameters()), torch.device("cpu"))
        inputs, labels = (
            {name: (value[:end] if value.dim() else value).to(device) for name, value in group.items()}
            for group in (batch.inputs, labels)
        )
        return inputs, labels

    def _labels(self, batch: Batch) -> Tensors:
        if batch.labels is None:
            raise DataError(
                f"distill{{task}} needs labels, and the rows have none beside {', '.join(batch.inputs)}; call their "
                "column `labels`, or name it in TrainingArguments(label_names=[...])"
            )
        return batch.labels

    def _call(self, outputs: Any, batch: Batch, items: Tensor | int | None) -> Tensor:
        assert self.given is not None
        labels = None if batch.labels is None else single(tuple(batch.labels.values()))
        try:
            return self.given(outputs, labels, num_items_in_batch=items)
        except IndexError as error:  # torch's "Target 7 is out of bounds."
            raise DataError(
                f"compute_loss_func can't take the labels in {', '.join(batch.labels or ())}: {first_line(error)}; "
                "make them fit the model's outputs"
            ) from error

    def _divides(self, outputs: Any, batch: Batch, items: Tensor | int, value: Tensor) -> bool:
        """Whether the given loss divides by the number of items, as Trainer asks; else it is a mean of its own."""
        if self._is_divided is None:
            with torch.no_grad():
                half = self._call(outputs, batch, 2 * items)
            if not bool(value.detach() == 0):
                self._is_divided = not torch.allclose(half, value.detach())
        return bool(self._is_divided)

    def _smoothed(self, outputs: Any, batch: Batch, count: float | None) -> Tensor:
        assert self.smoother is not None
        (labels,) = self._labels(batch).values()
        shifted = is_causal(self.source)
        options = {} if count is None else {"num_items_in_batch": torch.tensor(max(count, 1.0))}
        return self.smoother(outputs, labels, shift_labels=shifted, **options)


def shifts_labels(model: nn.Module) -> bool:
    """Whether Trainer counts a row's labels without the first, as it does for this model itself."""
    kind = LOSS_MAPPING.get(getattr(model, "loss_type", None))  # type: ignore[arg-type]
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return kind is ForCausalLMLoss and not encoder_decoder


def is_causal(model: nn.Module) -> bool:
    """Whether a label is that of the output before it: transformers' causal language models."""
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or shifts_labels(model)
