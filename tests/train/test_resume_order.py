"""A resumed run reads the rows that an uninterrupted one reads, in the same order and with the same random draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import bert_model
from tiny_training import PLAIN, different, history, rows, trainer, weights
from torch.utils.data import Dataset, IterableDataset
from transformers.data.data_collator import default_data_collator

from ti_fx.train import TernaryTrainer

ROWS = 18  # with batches of 4: epochs of 5 steps, whose last batch has 2 rows
STEPS = 13


class Augmented(Dataset[dict[str, Any]]):
    """Rows of which some words are replaced at random whenever they are read."""

    def __init__(self) -> None:
        self.rows = rows(ROWS, padded=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = dict(self.rows[index])
        row["input_ids"] = [
            int(torch.randint(1, 1100, ())),
            int(np.random.randint(1, 1100)),
            *row["input_ids"][2:],
        ]
        return row


class Stream(IterableDataset[dict[str, Any]]):
    """Rows without a length."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from rows(ROWS, padded=False)


def masked(batch: list[dict[str, Any]]) -> Any:
    """Collate, and mask some of the words at random, as masked language modelling does."""
    made = default_data_collator(batch)
    made["input_ids"][torch.rand(made["input_ids"].shape) < 0.3] = 1
    return made


def cut(count: int = ROWS) -> list[dict[str, Any]]:
    """Rows of 5 to 8 words, not padded."""
    whole = rows(count)
    return [
        {
            name: value[: sum(row["attention_mask"])] if isinstance(value, list) else value
            for name, value in row.items()
        }
        for row in whole
    ]


def padded(batch: list[dict[str, Any]]) -> Any:
    """Pad to the longest of the batch."""
    longest = max(len(row["input_ids"]) for row in batch)
    return default_data_collator(
        [
            {
                name: value + [0] * (longest - len(value)) if isinstance(value, list) else value
                for name, value in row.items()
            }
            for row in batch
        ]
    )


CASES: dict[str, dict[str, Any]] = {
    "random": {},
    "sequential": {"train_sampling_strategy": "sequential"},
    "group_by_length": {"train_sampling_strategy": "group_by_length", "rows": cut, "data_collator": padded},
    "batch_rebalance": {"train_sampling_strategy": "batch_rebalance", "rows": cut, "data_collator": padded},
    "unseeded": {"accelerator_config": {"use_seedable_sampler": False}},
    "data_seed": {"data_seed": 7, "gradient_accumulation_steps": 2, "max_steps": 7},
    "drop_last": {"dataloader_drop_last": True, "train_sampling_strategy": "group_by_length"},
    "augmented": {"rows": Augmented},
    "masked": {"data_collator": masked, "train_sampling_strategy": "sequential"},
    "workers": {"rows": Augmented, "dataloader_num_workers": 2},
    "stream": {"rows": Stream},
    "epochs": {"max_steps": -1, "num_train_epochs": 2.6, "train_sampling_strategy": "group_by_length"},
    "evaluated after saving": {"eval_strategy": "epoch", "train_sampling_strategy": "group_by_length"},
}  # fmt: skip
SLOW = ("unseeded", "workers", "drop_last", "data_seed", "stream")


def made(folder: Path, options: dict[str, Any]) -> TernaryTrainer:
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, **options}
    make: Callable[..., Any] = settings.pop("rows", lambda: rows(ROWS))
    collator = settings.pop("data_collator", None)
    return trainer(
        folder,
        PLAIN,
        model=bert_model(layers=1),
        train_dataset=make(),
        arguments_options=settings,
        data_collator=collator,
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]
)
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", CASES[name])
    whole.train()
    last = whole.state.global_step
    # in the first epoch, at its end, in a later one, before the last step
    for step in (2, 5, 8, last - 1) if name == "group_by_length" else (5, last - 2):
        resumed = made(tmp_path / f"from-{step}", CASES[name])
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert [one["loss"] for one in history(resumed)] == [one["loss"] for one in history(whole)], step
        assert different(weights(resumed), weights(whole)) == [], step
        assert resumed.state.global_step == last
