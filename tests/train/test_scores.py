"""Accuracy and macro-F1 are scikit-learn's, and what a Trainer gives is read."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction

from ti_fx.train.scores import scores, scores_of


def test_scores_equal_their_definition() -> None:
    found = scores(np.eye(3, dtype=np.float32)[[0, 0, 1, 1]], np.array([0, 1, 1, 2]))
    # F1 = 2 TP / (2 TP + FP + FN): 2/3 for class 0, 1/2 for class 1, 0 for class 2 that is never predicted.
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_scores_are_scikit_learns(classes: int) -> None:
    """With few rows some classes are in the labels alone, in the predictions alone, or in neither."""
    random = np.random.default_rng(classes)
    for rows in range(1, 21):
        logits, labels = random.normal(size=(rows, classes)), random.integers(0, classes, rows)
        found, predicted = scores(logits, labels), logits.argmax(-1)
        assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
        expected = f1_score(labels, predicted, average="macro", zero_division=0)
        assert found["macro_f1"] == pytest.approx(expected)


def test_a_trainers_logits_may_come_with_other_outputs() -> None:
    logits, labels = np.eye(3)[[0, 2, 1]], np.array([0, 2, 2])
    alone, beside = EvalPrediction(logits, labels), EvalPrediction((logits, np.zeros(3)), labels)  # type: ignore[arg-type]
    assert scores_of(alone) == scores_of(beside) == scores(logits, labels)
