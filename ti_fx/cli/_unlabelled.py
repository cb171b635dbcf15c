"""Makes batches of a model's inputs out of a file of rows without labels: texts, or the input tensors themselves."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ti_fx.errors import DataError, InputError, first_line

TENSOR_FILES = (".npz", ".safetensors")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """Batches to calibrate on, batches that are held out, and the tokenizer that made them, if one did."""

    used: list[Batch]
    held_out: list[Batch]
    tokenizer: Any = None

    @property
    def example(self) -> Batch:
        """The first rows, for a capture."""
        return {name: value[:2] for name, value in self.used[0].items()}


def read_rows(
    path: Path,
    held_out: Path | None,
    model: nn.Module,
    source: str,
    *,
    rows: int,
    batch_size: int,
    max_length: int,
    text_column: str | None,
    seed: int,
    alone: bool = False,
) -> Rows:
    """Return ``rows`` rows of a file in batches, and others that are held out.

    Rows are drawn by ``seed``. Those held out are of the file ``held_out``, or of the rest of ``path``: as many as are
    used; of a file that is too short for both, a fifth.

    Args:
        path: texts (``.csv``, ``.tsv``, ``.json``, ``.jsonl``) or arrays by input name (``.npz``, ``.safetensors``).
        held_out: in the same form; None: rows of ``path``.
        model: it says which inputs there are.
        source: where the tokenizer lies: a folder, or a name on the hub.
        rows: used at most.
        batch_size: rows a batch.
        max_length: tokens at which a text is cut.
        text_column: of texts; None: the usual names.
        seed: of the draw.
        alone: nothing is held out.

    Raises:
        DataError: a file can't be read, or has too few rows. InputError: there is no tokenizer.
    """
    read: Any
    others: Any
    if path.suffix.lower() in TENSOR_FILES:
        read, count = _tensors(path)
        others = None if held_out is None else _tensors(held_out)
        batch: Any = _Tensors(batch_size)
    else:
        from ti_fx.train.data import read_plain_texts

        read = read_plain_texts(path, text_column)
        count = len(read)
        texts = None if held_out is None else read_plain_texts(held_out, text_column)
        others = None if texts is None else (texts, len(texts))
        batch = _Texts(_tokenizer(source), model, max_length, batch_size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    if alone:
        return Rows(batch(read, order[:rows]), [], batch.tokenizer)
    if others is None and count < 2:
        raise DataError(f"{path} has {count} row, and one must be held out; give more rows, or --eval FILE")
    if others is not None:
        return Rows(batch(read, order[:rows]), batch(others[0], list(range(others[1]))), batch.tokenizer)
    kept = max(min(rows, count - rows), count // 5, 1)
    used = order[: min(rows, count - kept)]
    return Rows(batch(read, used), batch(read, order[len(used) : len(used) + kept]), batch.tokenizer)


class _Texts:
    def __init__(self, tokenizer: Any, model: nn.Module, max_length: int, batch_size: int) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.max_length, self.batch_size = max_length, batch_size
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def __call__(self, texts: Sequence[str], chosen: Sequence[int]) -> list[Batch]:
        """Return the chosen texts in batches, those of a length together."""
        encoded = self.tokenizer(
            [texts[index] for index in chosen], truncation=True, max_length=self.max_length
        )
        columns: dict[str, list[list[int]]] = dict(encoded)
        order = sorted(range(len(chosen)), key=lambda row: len(columns["input_ids"][row]))
        batches = []
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            padded = self.tokenizer.pad(
                {name: [column[row] for row in rows] for name, column in columns.items()}, return_tensors="pt"
            )
            batches.append(self._inputs(dict(padded)))
        return batches

    def _inputs(self, batch: Batch) -> Batch:
        taken = inspect.signature(self.model.forward).parameters
        shift: Any = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if "decoder_input_ids" in taken and shift is not None:
            shifted = shift(labels=batch["input_ids"])
            batch = {**batch, "decoder_input_ids": shifted}
        return {name: value for name, value in batch.items() if name in taken}


class _Tensors:
    tokenizer = None

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __call__(self, tensors: Batch, chosen: Sequence[int]) -> list[Batch]:
        """Return the chosen rows in batches."""
        return [
            {name: value[list(chosen[start : start + self.batch_size])] for name, value in tensors.items()}
            for start in range(0, len(chosen), self.batch_size)
        ]


def _tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=Path(source).exists())
    except Exception as error:  # tokenizers, transformers and the hub raise errors without a common base
        raise InputError(
            f"can't load a tokenizer from {source}: {first_line(error).rstrip('.')}; save one there, or give --data "
            f"as input tensors: {' or '.join(TENSOR_FILES)}"
        ) from error


def _tensors(path: Path) -> tuple[Batch, int]:
    """Return the tensors of a file by name, and how many rows each has.

    Raises:
        DataError: it can't be read, or they have unlike numbers of rows.
    """
    try:
        if path.suffix.lower() == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as arrays:
                found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            import safetensors.torch

            found = safetensors.torch.load_file(path)
    except Exception as error:  # NumPy, zipfile and safetensors raise errors without a common base
        raise DataError(f"can't read {path}: {first_line(error)}; give input tensors by name") from error
    counts = {name: len(value) if value.dim() else 0 for name, value in found.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        raise DataError(
            f"{path} holds arrays of {counts or 'no'} rows; give each input, a row each, as many of each"
        )
    return found, next(iter(counts.values()))
