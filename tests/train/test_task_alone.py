"""Plain quantisation-aware training: the task's loss alone, the model's own or one that is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import bert_model
from tiny_training import NO_DROPOUT, arguments, batch, different, history, rows, trainer, weights
from torch import Tensor

import ti_fx
from ti_fx import Recipe
from ti_fx.errors import InputError
from ti_fx.passes import Distill, Intervene
from ti_fx.recipe import Phase

ALONE = Distill(logits=0.0, layer_outputs=0.0, scores=0.0, attention_outputs=0.0, task=1.0)
INTERVENED = (Phase("map", Intervene("map"), 2), Phase("quantise", restart=True))


@pytest.mark.parametrize("schedule", [(Phase("quantise"),), pytest.param(INTERVENED, marks=pytest.mark.slow)])
def test_the_models_own_loss_alone_is_trained(schedule: Any, tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        Recipe("alone", distill=ALONE, schedule=schedule),
        model=bert_model(layers=1, **NO_DROPOUT),
        arguments_options={"max_steps": 4, "warmup_steps": 0},
        train_dataset=rows(4),
        evaluate_distillation=True,
    )
    assert bool(made.model.teacher_digests()) == (len(schedule) == 2)
    with torch.no_grad():
        logits = made.student()(**batch()).logits
    expected = float(F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])))
    before = weights(made)
    made.train()
    logged = made.state.log_history[0]
    assert logged["loss"] == pytest.approx(logged["loss_task"], rel=1e-5)
    if len(schedule) == 1:
        assert logged["loss_task"] == pytest.approx(expected, rel=1e-5)
    assert different(before, weights(made)) != []
    assert "eval_loss" in made.evaluate()
    made.save_model(str(tmp_path / "saved"))
    loaded = ti_fx.load(tmp_path / "saved")
    assert torch.equal(loaded(**batch()).logits, made.student()(**batch()).logits)


def test_an_objective_of_ones_own_needs_no_labels(tmp_path: Path) -> None:
    def confident(outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        assert labels is None
        loss: Tensor = -outputs.logits.log_softmax(-1).max(-1).values.mean()
        return loss

    made = trainer(
        tmp_path,
        Recipe("own", distill=ALONE),
        model=bert_model(layers=1, **NO_DROPOUT),
        arguments_options={"max_steps": 1},
        train_dataset=rows(4, labels=False),
        eval_dataset=rows(4, labels=False),
        compute_loss_func=confident,
    )
    with torch.no_grad():
        expected = float(confident(made.student()(**batch()), None))
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    made.train()
    assert history(made)[0]["loss_task"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_loss_of_the_model_that_is_none_is_refused_or_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    graph = ti_fx.capture(bert_model(layers=1), batch())
    with pytest.raises(InputError, match="pass the module itself, or pass compute_loss_func="):
        trainer(tmp_path, Recipe("alone", distill=ALONE), model=graph)
    plain = trainer(tmp_path, Recipe("plain"), model=ti_fx.capture(bert_model(layers=1), batch()))
    assert "eval_loss" not in plain.evaluate()
    assert "no evaluation loss: a captured graph takes no labels" in caplog.text
    assert arguments(tmp_path).label_names is None
