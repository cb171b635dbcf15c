"""Phases, accumulation, mixed precision and the task's own loss: what a training step adds up to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import bert_model
from tiny_training import (
    NO_DROPOUT,
    TERMS,
    At,
    Notes,
    arguments,
    batch,
    cross_entropy,
    different,
    rows,
    trainer,
    weights,
)
from torch import Tensor

import ti_fx
from ti_fx import Recipe
from ti_fx.errors import DataError, InputError
from ti_fx.passes import Distill, Intervene, QuantizeActivations
from ti_fx.recipe import Phase
from ti_fx.train import TernaryTrainer
from ti_fx.train.trainer import AUTO_COMPILE_STEPS

# --- the schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_of_an_earlier_phase_are_not_left_behind(tmp_path: Path) -> None:
    notes = Notes()
    recipe = Recipe(
        "inverted", schedule=(Phase("map", Intervene("map"), 2), Phase("output", Intervene("output")))
    )
    made = trainer(
        tmp_path,
        recipe,
        model=bert_model(layers=1),
        arguments_options={"max_steps": 4},
        callbacks=[notes],
    )
    kept = {}
    made.add_callback(At(begin=lambda step: kept.update({step: weights(made)})))
    made.train()
    block = "bert.encoder.layer.0.attention."
    idle = [f"{block}{part}.{kind}" for part in ("output.dense", "self.value") for kind in ("bias", "weight")]
    assert notes.untrained == [set(), set(), set(idle), set(idle)]
    assert not set(idle) & set(different(kept[0], kept[2])) - set(different(kept[1], kept[2]))
    assert not set(idle) & set(different(kept[2], weights(made)))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("cosine", {}), ("constant_with_warmup", {}), ("polynomial", {"lr_scheduler_kwargs": {"power": 2.0}})],
)
def test_other_schedules_restart_too(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    from ti_fx.train.schedule import learning_rate_factor, spans

    made = arguments(tmp_path, lr_scheduler_type=kind, warmup_steps=2, **options)
    laid = spans(Recipe.preset("ti-o", intervention_steps=6).phases(), 14)
    factor = learning_rate_factor(laid, made)
    assert [factor(step) for step in range(2)] == [0.0, 0.5]
    assert [factor(step) for step in range(6, 8)] == [0.0, 0.5]
    assert factor(2) == factor(8) == 1.0


def test_a_schedule_that_is_no_function_of_the_step_is_refused(tmp_path: Path) -> None:
    options = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "steps",
        "eval_steps": 5,
        "warmup_steps": 0,
    }
    made = trainer(tmp_path, model=bert_model(layers=1), arguments_options=options)
    with pytest.raises(InputError, match="no function of the step"):
        made.train()


@pytest.mark.slow
def test_too_few_steps_for_the_phases_are_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=bert_model(layers=1), arguments_options={"max_steps": 6})
    with pytest.raises(InputError, match="need at least 7 optimiser steps and training has 6"):
        made.train()


@pytest.mark.slow
def test_the_recipes_steps_are_taken_where_the_arguments_have_none(tmp_path: Path) -> None:
    made = arguments(tmp_path, max_steps=-1)
    recipe = Recipe("short", steps=2)
    short = TernaryTrainer(bert_model(layers=1), recipe, made, train_dataset=rows(), compile="off")
    short.train()
    assert short.state.global_step == 2
    assert made.max_steps == -1  # the caller's own arguments stay as they were


def test_auto_compiles_long_phases_only(tmp_path: Path) -> None:
    from ti_fx.train.trainer import compile_choice

    recipe = Recipe.preset("ti-o")
    assert compile_choice("auto", arguments(tmp_path, max_steps=100), recipe) == "off"
    assert compile_choice("auto", arguments(tmp_path, max_steps=2 * AUTO_COMPILE_STEPS), recipe) == "on"
    with pytest.raises(InputError, match="compile is 'maybe'; use 'on', 'off' or 'auto'"):
        compile_choice("maybe", arguments(tmp_path), recipe)


# --- accumulation and mixed precision -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", ["own", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "given"))]
)
def test_two_micro_batches_equal_one_batch_of_twice_the_size(task: str, tmp_path: Path) -> None:
    recipe = Recipe(
        "float",
        activations=QuantizeActivations(encoding="int8-token"),  # per token: a batch has no common range
        distill=Distill(task=0.0 if task == "none" else 0.5),
    )

    def first(micro_batch: int, accumulation: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        notes = Notes()
        made = trainer(
            tmp_path,
            recipe,
            model=bert_model(layers=1, **NO_DROPOUT),
            arguments_options={
                "max_steps": 1,
                "per_device_train_batch_size": micro_batch,
                "gradient_accumulation_steps": accumulation,
                "max_grad_norm": 0.0,
            },
            train_dataset=rows(padded=False),
            callbacks=[notes],
            compute_loss_func=cross_entropy if task == "given" else None,
        )
        made.train()
        return notes.gradients[0], made.state.log_history[0]

    (whole, logged), (halves, logged_halves) = first(8, 1), first(4, 2)
    assert whole.keys() == halves.keys()
    for name, gradient in whole.items():
        # float32 sums in another order: a few hundred roundings of 6e-8
        assert (gradient - halves[name]).abs().max() <= 1e-4 * gradient.abs().max() + 1e-9, name
    names = ["loss", *(f"loss_{term}" for term in TERMS), *(["loss_task"] if task != "none" else [])]
    for name in names:
        assert logged[name] == pytest.approx(logged_halves[name], rel=1e-4), name


@pytest.mark.slow
def test_bf16_autocast_trains_and_evaluates(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        model=bert_model(layers=1),
        arguments_options={"bf16": True, "max_steps": 7},
        evaluate_distillation=True,
    )
    made.train()
    assert all(math.isfinite(entry["loss"]) for entry in made.state.log_history if "loss" in entry)
    assert {value.dtype for value in made.model.parameters() if value.requires_grad} == {torch.float32}
    metrics = made.evaluate()
    assert math.isfinite(metrics["eval_distillation"])
    predictions: Any = made.predict(rows(4)).predictions
    assert predictions.dtype == "float32"


# --- the task's own loss --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_the_tasks_own_loss_joins_with_its_weight(given: bool, tmp_path: Path) -> None:
    model = bert_model(layers=1, **NO_DROPOUT)
    made = trainer(
        tmp_path,
        Recipe("task", distill=Distill(task=0.5)),
        model=model,
        arguments_options={"max_steps": 1},
        train_dataset=rows(4),
        compute_loss_func=cross_entropy if given else None,
    )
    with torch.no_grad():
        logits = made.student()(**batch()).logits
    made.train()
    logged = made.state.log_history[0]
    expected = float(F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])))
    assert logged["loss_task"] == pytest.approx(expected, rel=1e-5)  # the rows come in another order
    rest = sum(logged[f"loss_{term}"] for term in TERMS)
    assert logged["loss"] == pytest.approx(rest + 0.5 * logged["loss_task"], rel=1e-5)


def test_a_label_out_of_range_is_refused_in_one_line(tmp_path: Path) -> None:
    dataset: Any = [{**row, "labels": 7} for row in rows(4)]
    made = trainer(
        tmp_path, Recipe("task", distill=Distill(task=0.5)), model=bert_model(layers=1), train_dataset=dataset
    )
    with pytest.raises(DataError, match="label") as caught:
        made.train()
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="label"):
        made.evaluate(dataset)


def test_a_task_loss_that_nobody_can_compute_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pass compute_loss_func="):
        trainer(
            tmp_path,
            Recipe("task", distill=Distill(task=0.5)),
            model=ti_fx.capture(bert_model(layers=1), batch()),
        )
