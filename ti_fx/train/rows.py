"""TernaryTrainer reads label names, a collator and rows to capture with off a user's data before training."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.data.data_collator import default_data_collator
from transformers.utils.generic import find_labels

from ti_fx.errors import DataError, first_line
from ti_fx.frontend.wrappers import input_names

LABELS = ("labels", "label", "label_ids")
POSITIONS = ("start_positions", "end_positions")  # the labels of question answering
DECODER_INPUTS = "decoder_input_ids"


def collator(processing_class: Any) -> Callable[[list[Any]], Any]:
    """Return what makes a batch of rows: padding by the tokenizer if there is one."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return DataCollatorWithPadding(processing_class)
    return default_data_collator


def label_names(model: nn.Module, options: Mapping[str, Any]) -> list[str]:
    """Return the columns that hold labels, of all data sets: those that the model's forward names, or ``labels``."""
    found: list[str] = []
    if not isinstance(model, GraphModule):
        found = find_labels(type(model))  # type: ignore[no-untyped-call]
    columns = {
        name for rows in _firsts(options, 1) for row in rows if isinstance(row, Mapping) for name in row
    }
    if any(name in columns for name in LABELS):
        columns.add("labels")  # as the collators call them
    pairs = [name for name in POSITIONS if name in columns and name not in (_inputs(model) or ())]
    return [name for name in found if name in columns] or pairs or ["labels"]


def labels_of(model: nn.Module, batch: Mapping[str, Any], names: Sequence[str]) -> dict[str, Tensor] | None:
    """Return a batch's labels by the names that the model's forward has for them; None where it has none of them.

    One column of another name is the one label that the forward takes.

    Raises:
        DataError: some are there and some are not.
    """
    found = {name: batch[name] for name in names if batch.get(name) is not None}
    if not found:
        return None
    if missing := [name for name in names if name not in found]:
        raise DataError(
            f"rows have the labels {', '.join(found)} and no {missing[0]}; add it, or say which there are in "
            "TrainingArguments(label_names=[...])"
        )
    own = [] if isinstance(model, GraphModule) else find_labels(type(model))  # type: ignore[no-untyped-call]
    if len(names) == 1 and len(own) == 1:
        return {own[0]: found[names[0]]}
    return found


def _firsts(options: Mapping[str, Any], count: int) -> Iterator[list[Any]]:
    """Yield the first rows of the training data, and of each evaluation data set."""
    evaluation = options.get("eval_dataset")
    several = evaluation.values() if isinstance(evaluation, Mapping) else (evaluation,)
    for dataset in (options.get("train_dataset"), *several):
        if dataset is None:
            continue
        if isinstance(dataset, Sized):
            yield [dataset[index] for index in range(min(count, len(dataset)))]  # type: ignore[index]
        else:
            yield list(itertools.islice(dataset, count))


def _inputs(model: nn.Module) -> list[str] | None:
    """Return what the forward takes; None where it takes anything."""
    if isinstance(model, GraphModule):
        return [str(node.target) for node in model.graph.find_nodes(op="placeholder")]
    return input_names(model)


def first_rows(
    model: nn.Module, options: Mapping[str, Any], label_names: Sequence[str], remove_unused: bool | None
) -> dict[str, Any]:
    """Collate the first two rows and keep what the model's forward takes.

    As Trainer does, the collator is spared columns that the model doesn't take (texts, identifiers), unless
    TrainingArguments say ``remove_unused_columns=False``.
    """
    if options.get("train_dataset") is None and options.get("eval_dataset") is None:
        raise DataError("there is no data to capture the model with; pass train_dataset= or example=")
    rows = next(_firsts(options, 2), [])
    if not rows:
        raise DataError("train_dataset has 0 rows; give at least 1")
    names = _inputs(model)
    columns = ", ".join(map(str, rows[0])) if isinstance(rows[0], Mapping) else type(rows[0]).__name__
    batch = collated(model, rows, options, label_names, remove_unused)
    names = list(batch) if names is None else names
    kept = {name: batch[name] for name in names if name in batch and name not in {*label_names, *LABELS}}
    if not kept:
        raise DataError(f"no column of the data ({columns}) is an input of {type(model).__name__}")
    return with_decoder_inputs(model, kept, labels_of(model, batch, label_names) or {})


def first_batch(
    model: nn.Module, options: Mapping[str, Any], label_names: Sequence[str], remove_unused: bool | None
) -> Mapping[str, Any] | None:
    """Collate the first two rows of the training data, labels included; None where there are none."""
    if options.get("train_dataset") is None:
        return None
    rows = next(_firsts(options, 2))
    return collated(model, rows, options, label_names, remove_unused) if rows else None


def collated(
    model: nn.Module,
    rows: list[Any],
    options: Mapping[str, Any],
    label_names: Sequence[str],
    remove_unused: bool | None,
) -> Mapping[str, Any]:
    """Make a batch of rows as Trainer does: the collator is spared columns that the model does not take."""
    names = _inputs(model)
    if remove_unused and isinstance(rows[0], Mapping) and names is not None:
        wanted = {*names, *label_names, *LABELS}
        columns = ", ".join(map(str, rows[0]))
        rows = [{name: row[name] for name in row if name in wanted} for row in rows]
        if not any(rows):
            raise DataError(f"no column of the data ({columns}) is an input of {type(model).__name__}")
    batch: Mapping[str, Any] = options["data_collator"](rows)
    return batch


def with_decoder_inputs(
    model: nn.Module, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the inputs with those that the model's forward would make from the labels: a decoder's shifted words.

    Transformers' encoder-decoders do so where a row has labels and no ``decoder_input_ids``; a captured graph knows no
    labels.

    Raises:
        DataError: the model's configuration lacks an id that it takes.
    """
    words = labels.get("labels")
    given = {DECODER_INPUTS, "decoder_inputs_embeds"} & set(inputs)
    if words is None or given or words.dim() < 2 or words.is_floating_point():
        return dict(inputs)
    make = _shift(model)
    if make is None:
        return dict(inputs)
    try:
        return {**inputs, DECODER_INPUTS: make(words)}
    except (AttributeError, TypeError, ValueError, AssertionError) as error:  # no start or padding id
        raise DataError(
            f"rows have no {DECODER_INPUTS}, and {type(model).__name__} can't make them from the labels: "
            f"{first_line(error)}; add them to the rows"
        ) from error


def _shift(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return what a transformers model shifts its labels by, in one of the three forms that these have."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False) or DECODER_INPUTS not in (_inputs(model) or ()):
        return None
    for name in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
        if (own := getattr(model, name, None)) is not None:
            return own  # type: ignore[no-any-return]
    function = getattr(sys.modules.get(type(model).__module__), "shift_tokens_right", None)
    if function is None:
        return None
    ids = [config.pad_token_id, config.decoder_start_token_id]
    taken = len(inspect.signature(function).parameters) - 1
    return lambda words: function(words, *ids[:taken])
