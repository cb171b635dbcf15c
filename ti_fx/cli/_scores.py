"""Computes a classifier's accuracy and macro-F1 as scikit-learn does, which is not needed to train."""

from __future__ import annotations

import numpy as np
from transformers import EvalPrediction


def scores(prediction: EvalPrediction) -> dict[str, float]:
    """Return ``accuracy`` and ``macro_f1`` of logits [rows, classes] against labels [rows].

    Macro-F1 is the plain mean over the classes that occur in the labels or the predictions.
    """
    logits = (
        prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    )
    predicted, labels = np.argmax(logits, axis=-1), np.asarray(prediction.label_ids)
    f1 = []
    for label in np.union1d(predicted, labels):
        hits = int(((predicted == label) & (labels == label)).sum())
        f1.append(2 * hits / int((predicted == label).sum() + (labels == label).sum()))
    return {"accuracy": float((predicted == labels).mean()), "macro_f1": float(np.mean(f1))}
