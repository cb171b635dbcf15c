"""A sampler fixes the order of an epoch's rows and the seed of each batch, so that a resumed run reads the same ones.

Trainer's samplers draw an epoch's order from the process's random numbers, which a resumed run has others of when it
begins in the middle of an epoch; and what datasets and collators draw (augmentation, masked words) depends on how many
batches were fetched ahead. So the state that an order was drawn from goes into checkpoints, and each batch is fetched
and collated under a seed of its own, which leaves the process's random numbers as they were.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info


@dataclass(frozen=True)
class EpochStart:
    """Where the present epoch began.

    Attributes:
        epoch: counted from 0. step: the optimiser steps before it.
        state: of torch's random numbers, which its order was drawn from, [bytes] uint8; None: it has no order.
    """

    epoch: int
    step: int
    state: Tensor | None = None


class Place(int):
    """A row's index, with the seed of the batch that begins at this row."""

    seed: int


class RowOrder(Sampler[int]):
    """Trainer's own sampler, whose order can be drawn again.

    Attributes:
        start: the state of torch's random numbers that the present epoch's order was drawn from; None before the first.
    """

    def __init__(self, sampler: Any, shared_seed: int | None = None) -> None:
        """Wrap a sampler.

        Args:
            sampler: gives indices; may have ``set_epoch``.
            shared_seed: of several processes, which must draw one order; None: there is one process, and its random
                numbers are drawn from.
        """
        self.sampler = sampler
        self.shared_seed = shared_seed
        self.epoch = 0
        self.start: Tensor | None = None
        self._again: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch's order comes next."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def draw_again(self, start: Tensor) -> None:
        """Draw the next order from a state that :attr:`start` was."""
        self._again = start

    def __iter__(self) -> Iterator[int]:
        again, self._again = self._again, None
        if self.shared_seed is not None:
            again = torch.Generator().manual_seed(self.shared_seed + self.epoch).get_state()
        self.start = torch.get_rng_state() if again is None else again
        with nullcontext() if again is None else torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.start)
            indices = list(self.sampler)
        key = hashlib.sha256(self.start.numpy().tobytes() + f" {self.epoch}".encode())
        for number, index in enumerate(indices):
            place = Place(index)
            one = key.copy()
            one.update(f" {number}".encode())
            place.seed = int.from_bytes(one.digest()[:7], "big")
            yield place


class SeededRows(Dataset[Any]):
    """A dataset whose batches are fetched under the seed of their first row's place."""

    def __init__(self, rows: Any, seed: int) -> None:
        self.rows = rows
        self.seed = seed  # where the sampler is none of ours: with the batch's indices

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    def __getitems__(self, indices: list[int]) -> SeededBatch:
        """Return the rows of one batch."""
        plain = [int(index) for index in indices]
        seed = indices[0].seed if isinstance(indices[0], Place) else _seed_of(self.seed, plain)
        with drawn_from(seed):
            together = getattr(self.rows, "__getitems__", None)
            rows = [self.rows[index] for index in plain] if together is None else together(plain)
        return SeededBatch(rows, seed + 1)


class SeededStream(IterableDataset[Any]):
    """An iterable dataset that draws from random numbers of its own, which begin anew in each epoch."""

    def __init__(self, rows: Any, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch's rows come next."""
        self.epoch = epoch
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[StreamedRow]:
        worker = get_worker_info()
        first = _seed_of(self.seed, [self.epoch, 0 if worker is None else worker.id])
        with drawn_from(first):
            rows, state = iter(self.rows), _state()
        for number in itertools.count():
            with drawn_from(first):
                _set_state(state)
                try:
                    row = next(rows)
                except StopIteration:
                    return
                state = _state()
            yield StreamedRow(row, first + number)


@dataclass(frozen=True)
class StreamedRow:
    """A row, with the seed of the batch that begins with it."""

    row: Any
    seed: int


class SeededBatch(list[Any]):
    """Rows to collate under a seed."""

    def __init__(self, rows: Any, seed: int) -> None:
        super().__init__(rows)
        self.seed = seed


class SeededCollator:
    """A collator that draws from the batch's seed."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        """Make a batch of rows."""
        if rows and isinstance(rows[0], StreamedRow):
            rows = SeededBatch([one.row for one in rows], rows[0].seed)
        with drawn_from(rows.seed) if isinstance(rows, SeededBatch) else nullcontext():
            return self.collate(rows)


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's random numbers, and put them back after."""
    before = _state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        _set_state(before)


def _state() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_state(state: tuple[Any, Any, Tensor]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def _seed_of(seed: int, indices: list[int]) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {indices}".encode()).digest()[:7], "big")


def seeded(dataset: Any, seed: int) -> Any:
    """Return a dataset whose random draws begin anew with each batch, or, for an iterable one, with each epoch."""
    if has_order(dataset):
        return SeededRows(dataset, seed)
    # the iterable datasets of Hugging Face draw from a generator of their own, by epoch
    return dataset if hasattr(dataset, "_ex_iterable") else SeededStream(dataset, seed)


def has_order(dataset: Any) -> bool:
    """Return whether rows are fetched by index; an iterable dataset has an order of its own."""
    return isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset)
