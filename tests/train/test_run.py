"""One training run: what is logged, scheduled, trained and evaluated, and what stays as it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import bert_model
from tiny_training import (
    TERMS,
    Notes,
    accuracy,
    batch,
    different,
    history,
    rows,
    tensors,
    trainer,
    weights,
)

from ti_fx.train.model import digest

STEPS = 10


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
    """Under TI-O nothing reads V and W_O but the teacher's twin; under TI-C, V, as in the published code."""
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
