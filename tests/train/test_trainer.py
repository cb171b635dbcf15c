"""The models and data that the trainer takes, and which model it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import PlainTransformer, bert_model, seeded
from tiny_training import (
    LENGTH,
    NO_DROPOUT,
    PLAIN,
    At,
    accuracy,
    arguments,
    batch,
    cross_entropy,
    different,
    rows,
    tensors,
    trainer,
    weights,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast, TrainingArguments

import ti_fx
from ti_fx import Recipe
from ti_fx.errors import DataError, InputError
from ti_fx.passes import Distill, Intervene, Ternarize
from ti_fx.recipe import Phase
from ti_fx.train import TernaryTrainer
from ti_fx.train.model import digest

# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_module_a_captured_and_a_prepared_graph_train_alike(tmp_path: Path) -> None:
    options = {"max_steps": 3, "warmup_steps": 0}
    recipe = Recipe.preset("ti-c", intervention_steps=6)
    recipe = Recipe(
        "short", schedule=(Phase("context", Intervene("context"), 2), Phase("quantise", restart=True))
    )
    found = []
    for kind in ("module", "captured", "prepared"):
        model: nn.Module = bert_model(layers=1)
        if kind != "module":
            graph = ti_fx.capture(model, batch(3))
            if kind == "prepared":
                recipe.prepare(graph)
            model = graph
        made = trainer(tmp_path / kind, recipe, model=model, arguments_options=options)
        made.train()
        assert made.predict(rows(4)).label_ids is not None
        found.append(weights(made))
    assert different(found[0], found[1]) == []
    assert different(found[0], found[2]) == []
    assert different(found[0], dict(bert_model(layers=1).state_dict())) != []


def test_a_graph_prepared_by_another_recipe_is_refused(tmp_path: Path) -> None:
    graph = ti_fx.capture(bert_model(layers=1), batch())
    Recipe.preset("ti-o").prepare(graph)
    with pytest.raises(InputError, match="prepared by another recipe"):
        trainer(tmp_path, Recipe("other", ternarize=Ternarize(clip=1.0)), model=graph)


def test_a_plain_pytorch_model_trains(tmp_path: Path) -> None:
    data = [
        {"tokens": row["input_ids"], "keep": row["attention_mask"], "label": row["labels"]} for row in rows()
    ]
    model = seeded(lambda: PlainTransformer(layers=1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = trainer(
        tmp_path,
        Recipe(
            "plain",
            distill=Distill(task=1.0),
            schedule=(Phase("map", Intervene("map"), 2), Phase("quantise", restart=True)),
        ),
        model=model,
        arguments_options={"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2},
        train_dataset=data,
        eval_dataset=data[:8],
        compute_loss_func=cross_entropy,
        compute_metrics=accuracy,
    )
    made.train()
    assert different(before, weights(made)) != []
    evaluated = [entry for entry in made.state.log_history if "eval_accuracy" in entry]
    assert len(evaluated) == 2
    made.save_model(str(tmp_path / "saved"))
    loaded = ti_fx.load(tmp_path / "saved", model=PlainTransformer(layers=1))
    example = {"tokens": batch()["input_ids"], "keep": batch()["attention_mask"]}
    assert torch.equal(loaded(**example), made.student()(**example))


@pytest.mark.slow
def test_another_module_teaches(tmp_path: Path) -> None:
    teacher = bert_model(layers=1)
    with torch.no_grad():
        for value in teacher.parameters():
            value.add_(0.01)
    before = tensors(teacher)
    made = trainer(
        tmp_path, PLAIN, model=bert_model(layers=1), teacher=teacher, arguments_options={"max_steps": 2}
    )
    made.train()
    found = made.model.teacher_digests()
    assert found == {name: digest(before[name]) for name in found}
    assert different(before, tensors(teacher)) == []


def test_a_teacher_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the teacher's .* is \(.*\), the student's \("):
        trainer(
            tmp_path, PLAIN, model=bert_model(layers=1), teacher=bert_model(layers=1, intermediate_size=64)
        )


@pytest.mark.slow
def test_a_regression_model_trains_on_its_own_loss(tmp_path: Path) -> None:
    data: Any = [{**row, "labels": float(row["labels"]) / 2} for row in rows()]
    made = trainer(
        tmp_path,
        Recipe("regression", distill=Distill(task=1.0)),
        model=bert_model(layers=1, num_labels=1, **NO_DROPOUT),
        arguments_options={"max_steps": 2},
        train_dataset=data,
        eval_dataset=data[:8],
    )
    made.train()
    expected = F.mse_loss(
        torch.from_numpy(made.predict(data[:8]).predictions).squeeze(),
        torch.tensor([r["labels"] for r in data[:8]]),
    )
    assert made.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert made.state.log_history[0]["loss_task"] > 0


@pytest.mark.slow
def test_every_phases_graph_follows_a_change_of_type(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=bert_model(layers=1))
    model = made.model
    for phase in made.recipe.phases():
        model.enter(phase)
        model.train()(**batch())
    model.to(torch.float64)
    for phase in made.recipe.phases():
        model.enter(phase)
        result = model.train()(**batch())
        assert result["loss"].dtype == torch.float64
        assert {
            value.dtype for value in model.runners()[1].state_dict().values() if value.is_floating_point()
        } == {torch.float64}
        own = {name: value.data_ptr() for name, value in model.named_parameters()}
        for name, value in model.runners()[1].named_parameters():
            assert value.data_ptr() == own[name]
    assert made.student()(**batch()).logits.dtype == torch.float64


# --- data -----------------------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{index}": index for index in range(2, 1100)}}
    made: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = made(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), pad_token="[PAD]", unk_token="[UNK]"
    )
    return tokenizer


def ragged() -> Any:
    """Rows as a tokenizer leaves them, not padded, with columns that the model doesn't take."""
    return [
        {
            "text": f"row {index}",
            "id": index,
            "input_ids": [word for word in row["input_ids"] if word],
            "attention_mask": [1] * sum(row["attention_mask"]),
            "label": row["labels"],
        }
        for index, row in enumerate(rows())
    ]


@pytest.mark.slow
def test_rows_with_other_columns_are_padded_and_trained(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        PLAIN,
        model=bert_model(layers=1),
        arguments_options={"max_steps": 3},
        train_dataset=ragged(),
        eval_dataset=ragged()[:8],
        processing_class=tokenizer(),
        compute_metrics=accuracy,
    )
    made.train()
    assert "eval_accuracy" in made.evaluate()
    made.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "tokenizer.json").is_file()


class Stream(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Any:
        return iter(rows())


@pytest.mark.slow
def test_rows_may_come_from_a_stream(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        PLAIN,
        model=bert_model(layers=1),
        arguments_options={"max_steps": 2},
        train_dataset=Stream(),
        eval_dataset={"first": rows(4), "second": rows(8)},
    )
    made.train()
    assert {"eval_first_loss", "eval_second_loss"} <= set(made.evaluate())


def test_data_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    model = bert_model(layers=1)
    with pytest.raises(DataError, match="0 rows; give at least 1"):
        trainer(tmp_path, PLAIN, model=model, train_dataset=[], eval_dataset=None)
    with pytest.raises(DataError, match="pass train_dataset= or example="):
        trainer(tmp_path, PLAIN, model=model, train_dataset=None, eval_dataset=None)
    with pytest.raises(
        DataError, match=r"no column of the data \(text, words\) is an input of BertForSequence"
    ):
        trainer(tmp_path, PLAIN, model=model, train_dataset=[{"text": "a", "words": [1]}])


@pytest.mark.slow
def test_a_trainer_of_an_example_alone_evaluates(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, PLAIN, model=bert_model(layers=1), train_dataset=None, eval_dataset=None, example=batch(2)
    )
    predictions: Any = made.predict(rows(5)).predictions
    assert predictions.shape == (5, 3)


# --- saving ---------------------------------------------------------------------------------------------------------


def scripted(values: list[float]) -> Any:
    remaining = iter(values)
    return lambda prediction: {"accuracy": next(remaining)}


def best_of_two(folder: Path, **options: Any) -> TernaryTrainer:
    settings = {
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
    }
    return trainer(folder, PLAIN, model=bert_model(layers=1), arguments_options=settings, **options)


@pytest.mark.slow
def test_the_best_model_is_kept_and_loaded_at_the_end(tmp_path: Path) -> None:
    made = best_of_two(tmp_path, compute_metrics=scripted([0.1, 0.2, 0.9, 0.3, 0.4]))
    kept = {}
    made.add_callback(At(end=lambda step: kept.update({step: weights(made)})))
    made.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-5"]
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert different(weights(made), kept[3]) == []
    assert different(weights(made), kept[5]) != []


@pytest.mark.slow
def test_a_resumed_run_still_knows_its_best_model(tmp_path: Path) -> None:
    made = best_of_two(tmp_path, compute_metrics=scripted([0.1, 0.2, 0.9, 0.3]))

    def stop(step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    made.add_callback(At(begin=stop))
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    again = best_of_two(tmp_path, compute_metrics=scripted([0.4]))
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    loaded = ti_fx.load(tmp_path / "checkpoint-3")
    assert torch.equal(loaded(**batch()).logits, again.student()(**batch()).logits)


def test_torch_compile_in_the_arguments_is_refused(tmp_path: Path) -> None:
    made: TrainingArguments = arguments(tmp_path)
    made.torch_compile = True
    with pytest.raises(InputError, match="use TernaryTrainer"):
        TernaryTrainer(bert_model(layers=1), PLAIN, made, train_dataset=rows())


@pytest.mark.slow
def test_sequences_of_other_lengths_are_trained(tmp_path: Path) -> None:
    data = [{name: value[: 2 + index % (LENGTH - 2)] for name, value in row.items() if name != "labels"}
            for index, row in enumerate(rows(8, padded=False))]  # fmt: skip
    made = trainer(
        tmp_path,
        PLAIN,
        model=bert_model(layers=1),
        arguments_options={"max_steps": 8, "per_device_train_batch_size": 1},
        train_dataset=data,
        eval_dataset=None,
        example=batch(2),
    )
    made.train()
    assert made.state.global_step == 8
