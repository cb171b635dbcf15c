"""Training: what is logged, scheduled, trained and evaluated, and the models and data that the trainer takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import PlainTransformer, bert_model, seeded
from tiny_training import LENGTH, At, arguments, batch, different, history, rows, trainer, weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import EvalPrediction, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

import ti_fx
from ti_fx import Recipe
from ti_fx.errors import DataError, InputError
from ti_fx.passes import Distill, Intervene, QuantizeActivations, Ternarize
from ti_fx.recipe import Phase
from ti_fx.train import TernaryTrainer
from ti_fx.train.model import digest
from ti_fx.train.trainer import AUTO_COMPILE_STEPS

STEPS = 10
TERMS = ("logits", "layer_outputs", "scores", "attention_outputs")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PLAIN = Recipe("plain", schedule=(Phase("quantise"),))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits: Any = prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, also of those that a checkpoint leaves out."""
    return {
        name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]
    }


class Notes(TrainerCallback):
    """What the optimiser saw before and after each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.untrained: list[set[str]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.states: list[int] = []
        self.ages: list[set[int]] = []
        self.optimizers: set[int] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        optimizer = options["optimizer"]
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.optimizers.add(id(optimizer))
        self.states.append(len(optimizer.state))
        named = {name: value for name, value in options["model"].named_parameters() if value.requires_grad}
        self.untrained.append({name for name, value in named.items() if value.grad is None})
        self.gradients.append(
            {name: value.grad.clone() for name, value in named.items() if value.grad is not None}
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.ages.append({int(one["step"]) for one in options["optimizer"].state.values()})


class Run:
    """One ti-g run: 1 step at the output, 1 at the context, 4 at the map, then 4 of plain training."""

    def __init__(self, folder: Path) -> None:
        self.source = bert_model()
        self.before = tensors(self.source)
        self.notes = Notes()
        self.trainer = trainer(
            folder,
            model=self.source,
            arguments_options={"max_steps": STEPS, "eval_strategy": "steps", "eval_steps": 5},
            compute_metrics=accuracy,
            callbacks=[self.notes],
            evaluate_distillation=True,
        )
        self.trainer.train()
        self.logs = self.trainer.state.log_history
        self.steps = history(self.trainer)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


# --- what one run shows ---------------------------------------------------------------------------------------------


def test_every_loss_and_the_phase_are_logged_by_name(run: Run) -> None:
    assert [entry["phase"] for entry in run.steps] == ["output", "context", *["map"] * 4, *["quantise"] * 4]
    for entry in run.steps:
        assert {name for name in entry if name.startswith("loss_")} == {f"loss_{term}" for term in TERMS}
        # Trainer rounds nothing here; the sum is of float32 values, taken in another order
        assert entry["loss"] == pytest.approx(sum(entry[f"loss_{term}"] for term in TERMS), rel=1e-5)
    assert not math.isnan(run.logs[-1]["train_loss"])


def test_the_learning_rate_follows_the_formula_and_begins_anew_at_the_restart(run: Run) -> None:
    def linear(step: int, steps: int) -> float:
        warmup = math.ceil(0.25 * steps)
        return 1e-3 * (step / warmup if step < warmup else (steps - step) / (steps - warmup))

    expected = [linear(step, 6) for step in range(6)] + [linear(step, 4) for step in range(4)]
    assert run.notes.rates == pytest.approx(expected, rel=1e-12)


def test_the_optimiser_is_kept_and_its_state_cleared_at_the_restart(run: Run) -> None:
    assert len(run.notes.optimizers) == 1
    assert run.notes.states[0] == 0
    assert run.notes.states[6] == 0
    assert all(run.notes.states[step] for step in range(1, STEPS) if step != 6)
    assert run.notes.ages[5] == {6, 5, 4}  # W_O was first trained in step 1, V in step 2
    assert run.notes.ages[6] == {1}
    assert run.notes.ages[9] == {4}


def test_what_a_phase_does_not_train_has_no_gradient(run: Run) -> None:
    """Under TI-O nothing reads V and W_O but the teacher's twin; under TI-C, V (FACTS.md: the published code)."""
    layers = [f"bert.encoder.layer.{index}.attention." for index in range(2)]
    value = {f"{layer}self.value.{part}" for layer in layers for part in ("weight", "bias")}
    output = {f"{layer}output.dense.{part}" for layer in layers for part in ("weight", "bias")}
    assert run.notes.untrained == [value | output, value, *[set()] * (STEPS - 2)]


def test_the_teacher_is_bit_identical_after_training(run: Run) -> None:
    assert run.trainer.model.teacher_digests() == {
        name: digest(run.before[name]) for name in run.trainer.model.teacher_digests()
    }
    trained = {name: run.before[name] for name in weights(run.trainer)}
    assert different(trained, weights(run.trainer)) == sorted(dict(run.source.named_parameters()))


def test_the_student_is_the_users_model(run: Run) -> None:
    assert different(weights(run.trainer), dict(run.source.state_dict())) == []


def test_evaluation_reports_metrics_and_distillation(run: Run) -> None:
    entries = [entry for entry in run.logs if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [5, 10]
    expected = {f"eval_distillation_{term}" for term in TERMS} | {"eval_distillation"}
    assert {name for name in entries[0] if "distillation" in name} == expected
    assert 0 <= entries[1]["eval_accuracy"] <= 1


def test_distillation_is_reported_without_an_intervention(run: Run) -> None:
    metrics = run.trainer.evaluate(rows(4))
    with torch.no_grad():
        result = run.trainer.model.eval().distillation(batch())
    assert metrics["eval_distillation"] == float(result["loss"])
    for term in TERMS:
        assert metrics[f"eval_distillation_{term}"] == float(result["losses"][term])
    assert metrics["eval_loss"] == float(
        F.cross_entropy(result["outputs"].logits, torch.tensor([0, 1, 2, 0]))
    )


def test_evaluation_is_the_stripped_student_bit_for_bit_whatever_the_phase(run: Run) -> None:
    student = run.trainer.student()
    with torch.no_grad():
        expected = student(**batch()).logits
    before = run.trainer.model.phase
    for phase in run.trainer.recipe.phases():
        run.trainer.model.enter(phase)
        predicted: Any = run.trainer.predict(rows(4))
        assert torch.equal(torch.from_numpy(predicted.predictions), expected)
        assert predicted.label_ids.tolist() == [0, 1, 2, 0]
    run.trainer.model.enter(before)
    assert predicted.metrics is not None
    assert "test_accuracy" in predicted.metrics


def test_prediction_needs_no_labels(run: Run) -> None:
    predicted: Any = run.trainer.predict(rows(4, labels=False))
    assert predicted.label_ids is None
    assert predicted.predictions.shape == (4, 3)


def test_weights_decay_and_biases_and_norms_do_not(run: Run) -> None:
    named = {id(value): name for name, value in run.trainer.model.named_parameters()}
    optimizer: Any = run.trainer.optimizer
    groups = {
        group["weight_decay"]: {named[id(value)] for value in group["params"]}
        for group in optimizer.param_groups
    }
    assert set(groups) == {0.01, 0.0}
    trained = dict(run.source.named_parameters())
    assert groups[0.0] == {name for name in trained if name.endswith("bias") or "LayerNorm" in name}
    assert groups[0.01] == set(trained) - groups[0.0]


def test_each_tensor_is_in_the_state_once_under_its_source_name(run: Run) -> None:
    state = run.trainer.model.state_dict()
    student = {name for name in state if not name.startswith("teacher.")}
    assert student == set(run.source.state_dict())
    storages = [value.untyped_storage().data_ptr() for value in state.values()]
    assert len(set(storages)) == len(storages)
    assert {name.removeprefix("teacher.") for name in state if name not in student} <= set(run.before)


# --- the schedule ---------------------------------------------------------------------------------------------------


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


def test_too_few_steps_for_the_phases_are_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, model=bert_model(layers=1), arguments_options={"max_steps": 6})
    with pytest.raises(InputError, match="need at least 7 optimiser steps and training has 6"):
        made.train()


def test_the_recipes_steps_are_taken_where_the_arguments_have_none(tmp_path: Path) -> None:
    made = arguments(tmp_path, max_steps=-1)
    recipe = Recipe("short", steps=2)
    short = TernaryTrainer(bert_model(layers=1), recipe, made, train_dataset=rows(), compile="off")
    short.train()
    assert short.state.global_step == 2
    assert made.max_steps == -1  # the caller's own arguments stay as they were


def test_auto_compiles_long_phases_only(tmp_path: Path) -> None:
    from ti_fx.train.trainer import _compile

    recipe = Recipe.preset("ti-o")
    assert _compile("auto", arguments(tmp_path, max_steps=100), recipe) == "off"
    assert _compile("auto", arguments(tmp_path, max_steps=2 * AUTO_COMPILE_STEPS), recipe) == "on"
    with pytest.raises(InputError, match="compile is 'maybe'; use 'on', 'off' or 'auto'"):
        _compile("maybe", arguments(tmp_path), recipe)


# --- accumulation and mixed precision -------------------------------------------------------------------------------


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


def cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    logits = outputs if isinstance(outputs, Tensor) else outputs.logits
    return F.cross_entropy(logits, labels)


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


# --- models ---------------------------------------------------------------------------------------------------------


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


def test_the_best_model_is_kept_and_loaded_at_the_end(tmp_path: Path) -> None:
    made = best_of_two(tmp_path, compute_metrics=scripted([0.1, 0.2, 0.9, 0.3, 0.4]))
    kept = {}
    made.add_callback(At(end=lambda step: kept.update({step: weights(made)})))
    made.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-5"]
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert different(weights(made), kept[3]) == []
    assert different(weights(made), kept[5]) != []


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
