"""TernaryTrainer reads label names, a collator and rows to capture with off a user's data before training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

from torch import nn
from torch.fx import GraphModule
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.data.data_collator import default_data_collator
from transformers.utils.generic import find_labels

from ti_fx.errors import DataError
from ti_fx.frontend.wrappers import input_names

LABELS = ("labels", "label", "label_ids")


def collator(processing_class: Any) -> Callable[[list[Any]], Any]:
    """Return what makes a batch of rows: padding by the tokenizer if there is one."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return DataCollatorWithPadding(processing_class)
    return default_data_collator


def label_names(model: nn.Module, options: dict[str, Any]) -> list[str]:
    """Return the columns that hold labels: the model's own names for them, or ``labels``; none if the data has none."""
    found: list[str] = []
    if not isinstance(model, GraphModule):
        found = find_labels(type(model))  # type: ignore[no-untyped-call]
    row = next(iter(_first(options, 1)), None)
    if row is None:
        return found or ["labels"]
    columns = list(row) if isinstance(row, Mapping) else []
    present = [name for name in found if name in columns]
    if present:
        return present
    return ["labels"] if any(name in columns for name in LABELS) else []


def _first(options: Mapping[str, Any], count: int) -> list[Any]:
    """Return the first rows of the training data, or of the evaluation data (the first of several)."""
    for name in ("train_dataset", "eval_dataset"):
        dataset = options.get(name)
        if isinstance(dataset, Mapping):
            dataset = next(iter(dataset.values()), None)
        if dataset is None:
            continue
        if isinstance(dataset, Sized):
            return [dataset[index] for index in range(min(count, len(dataset)))]  # type: ignore[index]
        return list(itertools.islice(dataset, count))
    return []


def first_rows(
    model: nn.Module, options: Mapping[str, Any], label_names: Sequence[str], remove_unused: bool | None
) -> dict[str, Any]:
    """Collate the first two rows and keep what the model's forward takes.

    As Trainer does, the collator is spared columns that the model doesn't take (texts, identifiers), unless
    TrainingArguments say ``remove_unused_columns=False``.
    """
    if options.get("train_dataset") is None and options.get("eval_dataset") is None:
        raise DataError("there is no data to capture the model with; pass train_dataset= or example=")
    rows = _first(options, 2)
    if not rows:
        raise DataError("train_dataset has 0 rows; give at least 1")
    if isinstance(model, GraphModule):
        names: list[str] | None = [str(node.target) for node in model.graph.find_nodes(op="placeholder")]
    else:
        names = input_names(model)
    columns = ", ".join(map(str, rows[0])) if isinstance(rows[0], Mapping) else type(rows[0]).__name__
    if remove_unused and isinstance(rows[0], Mapping) and names is not None:
        wanted = {*names, *label_names, *LABELS}
        rows = [{name: row[name] for name in row if name in wanted} for row in rows]
        if not any(rows):
            raise DataError(f"no column of the data ({columns}) is an input of {type(model).__name__}")
    batch = options["data_collator"](rows)
    names = list(batch) if names is None else names
    kept = {name: batch[name] for name in names if name in batch and name not in {*label_names, *LABELS}}
    if not kept:
        raise DataError(f"no column of the data ({columns}) is an input of {type(model).__name__}")
    return kept
