"""The demo measures accuracy, agreement and latency anew at every run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ti_fx.demo.data import TokenizedQuestions
from ti_fx.export import session
from ti_fx.measure.stopwatch import medians

Logits = NDArray[np.float32]
Call = Callable[[Mapping[str, Tensor]], Logits]


def batches(
    dataset: TokenizedQuestions, tokenizer: PreTrainedTokenizerBase, size: int = 32
) -> Iterator[tuple[dict[str, Tensor], NDArray[np.int64]]]:
    """Yield padded inputs ``(batch, sequence)`` and labels, in the order of the data set."""
    collate = DataCollatorWithPadding(tokenizer)
    for start in range(0, len(dataset), size):
        batch = dict(
            collate([dict(dataset[index]) for index in range(start, min(start + size, len(dataset)))])
        )
        labels = batch.pop("labels").numpy()
        yield batch, labels


def logits_of(
    call: Call, dataset: TokenizedQuestions, tokenizer: PreTrainedTokenizerBase
) -> tuple[Logits, NDArray[np.int64]]:
    """Return all logits ``(rows, classes)`` and labels ``(rows,)``."""
    found = [(call(inputs), labels) for inputs, labels in batches(dataset, tokenizer)]
    return np.concatenate([logits for logits, _ in found]), np.concatenate([labels for _, labels in found])


def torch_call(module: torch.nn.Module, inputs: Sequence[str]) -> Call:
    """Call a PyTorch module in eval mode, without gradients."""
    module.eval()

    def call(batch: Mapping[str, Tensor]) -> Logits:
        with torch.no_grad():
            result: Any = module(**{name: batch[name] for name in inputs})
        logits: Logits = result["logits"].float().numpy()
        return logits

    return call


def onnx_call(path: Path, threads: int | None = None) -> Call:
    """Call an ONNX file in ONNX Runtime."""
    run = session(path, threads)
    names = [value.name for value in run.get_inputs()]

    def call(batch: Mapping[str, Tensor]) -> Logits:
        (logits,) = run.run(None, {name: batch[name].numpy() for name in names})
        return np.asarray(logits, dtype=np.float32)

    return call


def agreement(ours: Logits, reference: Logits) -> dict[str, float]:
    """Compare two implementations of one model: share of equal classes, and logit gaps over the logits' range."""
    span = float(reference.max() - reference.min()) or 1.0
    gap = np.abs(ours - reference) / span
    return {
        "same_class": float((ours.argmax(-1) == reference.argmax(-1)).mean()),
        "max": float(gap.max()),
        "p99": float(np.quantile(gap, 0.99)),
        "mean": float(gap.mean()),
    }


def latencies(
    files: Mapping[str, Path],
    *,
    batch_sizes: Sequence[int],
    sequence: int,
    threads: Sequence[int],
    rounds: int,
    vocabulary: int,
) -> list[dict[str, Any]]:
    """Time files against each other, one call of each in turn, and return medians in milliseconds.

    Returns:
        A row per threads and batch size: ``{"threads", "batch", "sequence", "milliseconds": {name: median}}``.
    """
    rows = []
    generator = torch.Generator().manual_seed(0)
    for count in threads:
        calls = {name: onnx_call(path, count) for name, path in files.items()}
        for size in batch_sizes:
            ids = torch.randint(1000, vocabulary, (size, sequence), generator=generator)
            batch = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "token_type_ids": torch.zeros_like(ids),
            }
            taken = medians({name: partial(call, batch) for name, call in calls.items()}, rounds)
            rows.append({"threads": count, "batch": size, "sequence": sequence, "milliseconds": taken})
    return rows
