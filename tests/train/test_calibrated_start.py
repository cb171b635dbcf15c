"""A recipe's ``calibrate``: the trainer's own rows set the weights before its first step, and only then."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from models import bert_model, t5_model
from tiny_training import At, batch, different, rows, trainer, weights
from torch.utils.data import IterableDataset

import ti_fx
from ti_fx import Recipe
from ti_fx.errors import DataError, PreconditionError, RecipeError
from ti_fx.passes import Calibrate, Distill, Ternarize
from ti_fx.train.calibration import is_rounded

ROWS = 24
RECIPE = dataclasses.replace(Recipe.preset("ternarybert"), calibrate=Calibrate(rows=ROWS, batch_size=8))
SHORT = {"max_steps": 2}
ALONE = Distill(logits=0, layer_outputs=0, scores=0, attention_outputs=0, task=1.0)


def test_the_weights_are_those_of_the_pass_on_the_same_rows(tmp_path: Path) -> None:
    made = trainer(tmp_path, RECIPE, model=bert_model(layers=1))
    made.calibrate()
    assert made.calibration is not None
    order = torch.randperm(48, generator=torch.Generator().manual_seed(made.args.seed)).tolist()[:ROWS]
    data = rows(padded=True)
    used = [data[index] for index in order]
    gm = ti_fx.capture(bert_model(layers=1), batch(2))
    RECIPE.prepare(gm)
    tensors = {name: torch.tensor([row[name] for row in used]) for name in ("input_ids", "attention_mask")}
    ti_fx.Pipeline(Calibrate(rows=ROWS, batch_size=8, data=tensors))(gm)
    own, expected = weights(made), dict(gm.named_parameters())
    assert own
    for name, value in own.items():
        torch.testing.assert_close(value, expected[name])


def test_it_is_done_before_the_first_step_and_once(tmp_path: Path) -> None:
    seen: list[Any] = []
    made = trainer(tmp_path, RECIPE, model=bert_model(layers=1), arguments_options=SHORT)
    assert is_rounded(made.model.prepared())
    made.add_callback(At(begin=lambda step: seen.append((step, is_rounded(made.model.prepared())))))
    made.train()
    assert seen == [(0, False), (1, False)]
    report = made.calibration
    made.calibrate()
    assert made.calibration is report


def test_resuming_does_not_calibrate_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, RECIPE, model=bert_model(layers=1), arguments_options=options)
    whole.train()
    resumed = trainer(tmp_path, RECIPE, model=bert_model(layers=1), arguments_options=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.calibration is None
    assert not different(weights(whole), weights(resumed))


def test_a_start_of_the_students_own_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student: Any = bert_model(layers=1)
    with torch.no_grad():
        student.bert.encoder.layer[0].output.dense.weight.mul_(1.5)
    made = trainer(tmp_path, RECIPE, model=student, teacher=bert_model(layers=1))
    before = weights(made)
    with caplog.at_level(logging.WARNING, logger="ti_fx"):
        made.calibrate()
    assert made.calibration is None
    assert "weights of its own" in caplog.text
    assert not different(before, weights(made))


class Stream(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Any:
        return iter(rows())


def test_rows_of_a_stream_and_of_an_encoder_decoder(tmp_path: Path) -> None:
    streamed = trainer(tmp_path, RECIPE, model=bert_model(layers=1), train_dataset=Stream())
    streamed.calibrate()
    assert streamed.calibration is not None
    texts = [{**row, "labels": row["input_ids"][:5]} for row in rows(padded=False)]
    t5 = t5_model(decoder_start_token_id=0)
    made = trainer(tmp_path, RECIPE, model=t5, train_dataset=texts, eval_dataset=None)
    made.calibrate()
    assert made.calibration is not None
    assert any("decoder" in row.name and row.rows for row in made.calibration.report)


def test_what_can_not_be_calibrated_is_refused_before_training(tmp_path: Path) -> None:
    grouped = dataclasses.replace(RECIPE, ternarize=Ternarize(weights="group-32"))
    with pytest.raises(PreconditionError, match="per group-32"):
        trainer(tmp_path, grouped, model=bert_model(layers=1))
    alone = dataclasses.replace(RECIPE, distill=ALONE)
    with pytest.raises(PreconditionError, match="needs a teacher"):
        trainer(tmp_path, alone, model=bert_model(layers=1))
    made = trainer(tmp_path, RECIPE, model=bert_model(layers=1), train_dataset=None)
    with pytest.raises(DataError, match="no data to calibrate with"):
        made.calibrate()


def test_a_recipes_file_has_its_options(tmp_path: Path) -> None:
    RECIPE.save(tmp_path / "mine.yaml")
    assert Recipe.load(tmp_path / "mine.yaml") == RECIPE
    assert RECIPE.to_dict()["calibrate"]["rows"] == ROWS
    assert "data" not in RECIPE.to_dict()["calibrate"]
    assert "calibrate{rows=24 batch_size=8}" in str(RECIPE)
    with pytest.raises(RecipeError, match=r"recipe\.calibrate has no option 'row'; did you mean 'rows'"):
        Recipe.from_dict({"name": "mine", "calibrate": {"row": 3}})
