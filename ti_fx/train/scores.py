"""Accuracy and macro-F1 of a classifier, as scikit-learn defines them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import EvalPrediction


def scores(logits: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """Return ``accuracy`` and ``macro_f1`` of logits [rows, classes] against labels [rows].

    F1 of a class is 2 TP / (2 TP + FP + FN), 0 of one that is never predicted; macro-F1 is the plain mean over the
    classes that occur in the labels or the predictions.
    """
    predicted = np.argmax(logits, axis=-1)
    f1 = []
    for label in np.union1d(predicted, labels):
        hits = int(((predicted == label) & (labels == label)).sum())
        f1.append(2 * hits / int((predicted == label).sum() + (labels == label).sum()))
    return {"accuracy": float((predicted == labels).mean()), "macro_f1": float(np.mean(f1))}


def scores_of(prediction: EvalPrediction) -> dict[str, float]:
    """Return the same of what a ``Trainer`` gives to ``compute_metrics``; the logits are its first output."""
    found = prediction.predictions
    return scores(found[0] if isinstance(found, tuple) else found, np.asarray(prediction.label_ids))
