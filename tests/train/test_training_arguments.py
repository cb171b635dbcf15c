"""Every field of TrainingArguments is honoured or refused, and what steers labels and outputs does so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert_model
from tiny_training import PLAIN, accuracy, arguments, batch, history, rows, trainer
from transformers import TrainingArguments

from ti_fx import Recipe
from ti_fx.errors import DataError, InputError
from ti_fx.passes import Distill, Intervene
from ti_fx.recipe import Phase
from ti_fx.train.arguments import REFUSED, fields, require_arguments

TASK = Recipe("task", distill=Distill(task=1.0))


def test_every_field_of_the_installed_transformers_is_in_the_table() -> None:
    assert set(TrainingArguments.__dataclass_fields__) == fields()


OTHER: dict[str, Any] = {
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 5.0,
    "optim_target_modules": ["dense"],
    "parallelism_config": object(),
    "debug": ["underflow_overflow"],
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_change_nothing_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    made = arguments(tmp_path)
    require_arguments(made, PLAIN, bert_model(layers=1))
    setattr(made, name, OTHER.get(name, True))
    with pytest.raises(InputError, match=f"^{name} ") as caught:
        require_arguments(made, PLAIN, bert_model(layers=1))
    assert "\n" not in str(caught.value)


def test_what_this_recipe_has_no_use_for_is_refused(tmp_path: Path) -> None:
    smoothed = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(InputError, match="set Distill\\(task"):
        require_arguments(smoothed, PLAIN, bert_model(layers=1))
    require_arguments(smoothed, TASK, bert_model(layers=1))
    with pytest.raises(InputError, match="compute_loss_func"):
        require_arguments(smoothed, TASK, torch.nn.Linear(2, 2))
    used = arguments(tmp_path, ddp_find_unused_parameters=False)
    require_arguments(used, PLAIN, bert_model(layers=1))
    phases = (Phase("map", Intervene("map"), 2), Phase("quantise"))
    with pytest.raises(InputError, match="an intervention leaves"):
        require_arguments(used, Recipe("two", schedule=phases), bert_model(layers=1))


# --- labels -------------------------------------------------------------------------------------------------------


def called(name: str, count: int = 8) -> Any:
    return [{**{key: row[key] for key in batch()}, name: row["labels"]} for row in rows(count)]


@pytest.mark.slow
def test_a_label_column_of_another_name_is_refused_or_named(tmp_path: Path) -> None:
    options: dict[str, Any] = {"train_dataset": called("score"), "eval_dataset": called("score")}
    with pytest.raises(DataError, match=r"needs labels.*label_names=\[\.\.\.\]"):
        trainer(tmp_path, TASK, model=bert_model(layers=1), **options)
    named = trainer(
        tmp_path,
        TASK,
        model=bert_model(layers=1),
        arguments_options={"label_names": ["score"], "max_steps": 1},
        compute_metrics=accuracy,
        **options,
    )
    usual = trainer(
        tmp_path,
        TASK,
        model=bert_model(layers=1),
        arguments_options={"max_steps": 1},
        compute_metrics=accuracy,
    )
    found, expected = named.evaluate(), usual.evaluate()
    assert found["eval_loss"] == expected["eval_loss"]
    assert found["eval_accuracy"] == expected["eval_accuracy"]
    named.train()
    assert history(named)[0]["loss_task"] > 0


@pytest.mark.slow
def test_labels_of_evaluation_rows_alone_reach_the_metrics(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        PLAIN,
        model=bert_model(layers=1),
        arguments_options={"max_steps": 1},
        train_dataset=rows(8, labels=False),
        compute_metrics=accuracy,
    )
    made.train()
    assert {"eval_accuracy", "eval_loss"} <= set(made.evaluate())


def test_rows_without_labels_for_the_metrics_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(
        tmp_path, PLAIN, model=bert_model(layers=1), eval_dataset=called("score"), compute_metrics=accuracy
    )
    assert "eval_accuracy" not in made.evaluate()
    assert "compute_metrics was given, and the rows have no labels" in caplog.text


# --- outputs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_keys_are_ignored_in_nested_outputs_and_by_the_configuration(tmp_path: Path) -> None:
    model: Any = bert_model(layers=1, output_hidden_states=True, output_attentions=True)
    made = trainer(tmp_path, PLAIN, model=model)
    assert len(made.predict(rows(4)).predictions) == 1 + 2 + 1
    assert len(made.predict(rows(4), ignore_keys=["hidden_states"]).predictions) == 1 + 1
    assert len(made.predict(rows(4), ignore_keys=["hidden_states.0"]).predictions) == 1 + 1 + 1
    model.config.keys_to_ignore_at_inference = ["hidden_states", "attentions"]
    found: Any = made.predict(rows(4)).predictions
    assert found.shape == (4, 3)
