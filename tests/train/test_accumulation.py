"""Gradients of an accumulated batch are those of the whole batch, whatever its micro-batches hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accumulated import BY_TOKEN, REAL, gpt2, unequal_rows
from models import bert_model
from tiny_training import NO_DROPOUT, Notes, batch, history, rows, trainer
from torch import Tensor, nn

from ti_fx import Recipe
from ti_fx.passes import Distill


def step(
    folder: Path, recipe: Recipe, model: nn.Module, size: int, count: int, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train one step of ``count`` micro-batches and return the gradients and the log."""
    notes = Notes()
    made = trainer(
        folder,
        recipe,
        model=model,
        arguments_options={
            "max_steps": 1,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": count,
            "max_grad_norm": 0.0,
        },
        eval_dataset=None,
        callbacks=[notes],
        **options,
    )
    made.train()
    return notes.gradients[0], made.state.log_history[0]


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    scale = torch.stack([value.norm() for value in one.values()]).norm()
    return float(torch.stack([(one[name] - other[name]).norm() for name in one]).norm() / scale)


@pytest.mark.parametrize(("size", "count"), [(2, 4), pytest.param(1, 8, marks=pytest.mark.slow)])
def test_masked_losses_of_unequal_rows_accumulate_to_the_whole(size: int, count: int, tmp_path: Path) -> None:
    recipe = Recipe("masked", activations=BY_TOKEN, distill=Distill(mask_padding=True, task=0.5))
    made = [
        step(tmp_path, recipe, bert_model(layers=1, **NO_DROPOUT), *sizes, train_dataset=unequal_rows())
        for sizes in ((8, 1), (size, count))
    ]
    assert largest_difference(made[0][0], made[1][0]) <= 1e-5
    for name, value in made[0][1].items():
        if name.startswith("loss"):
            assert made[1][1][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow
def test_a_language_models_own_loss_is_over_all_labels_of_the_step(tmp_path: Path) -> None:
    recipe = Recipe("language", activations=BY_TOKEN, distill=Distill(task=1.0, mask_padding=True))
    whole, logged = step(tmp_path, recipe, gpt2(), 8, 1, train_dataset=unequal_rows(causal=True))
    # a row of one token has no label that follows another
    parts, logged_parts = step(tmp_path, recipe, gpt2(), 1, 8, train_dataset=unequal_rows(causal=True))
    assert largest_difference(whole, parts) <= 1e-5
    assert logged["loss_task"] == pytest.approx(logged_parts["loss_task"], rel=1e-5)


@pytest.mark.slow
def test_a_loss_of_ones_own_is_told_the_items_of_the_whole_step(tmp_path: Path) -> None:
    told: list[int] = []

    def shifted(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        told.append(int(num_items_in_batch))
        logits = outputs.logits[:, :-1].flatten(0, 1)
        summed = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum", ignore_index=-100)
        loss: Tensor = summed / num_items_in_batch
        return loss

    recipe = Recipe("own", activations=BY_TOKEN, distill=Distill(task=1.0, mask_padding=True))
    options = {"train_dataset": unequal_rows(causal=True), "compute_loss_func": shifted}
    whole, _ = step(tmp_path, recipe, gpt2(), 8, 1, **options)
    parts, _ = step(tmp_path, recipe, gpt2(), 2, 4, **options)
    assert largest_difference(whole, parts) <= 1e-5
    items = sum(REAL)  # as Trainer counts for GPT-2
    assert set(told) <= {items, 2 * items}  # twice, once: does it divide by what it is told?


@pytest.mark.slow
def test_a_last_micro_batch_of_fewer_rows_counts_for_less(tmp_path: Path) -> None:
    recipe = Recipe("rows", activations=BY_TOKEN, distill=Distill(task=1.0))
    data = rows(7, padded=False)
    whole, _ = step(tmp_path, recipe, bert_model(layers=1, **NO_DROPOUT), 7, 1, train_dataset=data)
    parts, _ = step(tmp_path, recipe, bert_model(layers=1, **NO_DROPOUT), 4, 2, train_dataset=data)
    assert largest_difference(whole, parts) <= 1e-5


@pytest.mark.slow
def test_a_label_that_is_smoothed(tmp_path: Path) -> None:
    recipe = Recipe("smooth", activations=BY_TOKEN, distill=Distill(task=1.0))
    made = trainer(
        tmp_path,
        recipe,
        model=bert_model(layers=1, **NO_DROPOUT),
        arguments_options={"label_smoothing_factor": 0.2, "max_steps": 1},
        train_dataset=rows(4),
    )
    with torch.no_grad():
        logits = made.student()(**batch()).logits
    expected = float(F.cross_entropy(logits, torch.tensor([0, 1, 2, 0]), label_smoothing=0.2))
    assert made.evaluate(rows(4))["eval_loss"] == pytest.approx(expected, rel=1e-5)
    made.train()
    assert history(made)[0]["loss_task"] == pytest.approx(expected, rel=1e-5)
