"""A resumed run reads the rows that an uninterrupted one reads, in the same order and with the same random draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import seeded
from one_layer import OneLayer
from tiny_training import PLAIN, different, history, rows, trainer, weights
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback
from transformers.data.data_collator import default_data_collator

from ti_fx import Phase, Recipe
from ti_fx.errors import CheckpointError
from ti_fx.passes import Intervene
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
        given = rows(ROWS, padded=False)
        for index in torch.randperm(len(given)).tolist():  # shuffled, and augmented as they come
            given[index]["input_ids"][0] = random.randrange(1, 1100)
            yield given[index]


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
    "stream": {"rows": Stream, "data_collator": masked},
    "epochs": {"max_steps": -1, "num_train_epochs": 2.6, "train_sampling_strategy": "group_by_length"},
    "evaluated after saving": {"eval_strategy": "epoch", "train_sampling_strategy": "group_by_length"},
}  # fmt: skip
QUICK = ("group_by_length",)


class SaveAt(TrainerCallback):
    """Save a checkpoint after these steps."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        control.should_save = state.global_step in self.steps


def made(folder: Path, options: dict[str, Any], steps: tuple[int, ...] = ()) -> TernaryTrainer:
    settings = {"max_steps": STEPS, **options}
    make: Callable[..., Any] = settings.pop("rows", lambda: rows(ROWS))
    collator = settings.pop("data_collator", None)
    return trainer(
        folder,
        PLAIN,
        model=seeded(OneLayer),
        train_dataset=make(),
        arguments_options=settings,
        data_collator=collator,
        callbacks=[SaveAt(steps)],
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    # within the second epoch; the slow ones: within the first, at its end, and just after
    steps = (8,) if name in QUICK else (2, 5, 6)
    whole = made(tmp_path / "whole", CASES[name], steps)
    whole.train()
    for step in steps:
        resumed = made(tmp_path / f"from-{step}", CASES[name])
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert [one["loss"] for one in history(resumed)] == [one["loss"] for one in history(whole)], step
        assert different(weights(resumed), weights(whole)) == [], step
        assert resumed.state.global_step == whole.state.global_step


def test_a_finished_run_is_loaded_and_not_trained_on(tmp_path: Path) -> None:
    whole = made(tmp_path, {"max_steps": 2}, (2,))
    whole.train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for options in ({"max_steps": 2}, {"max_steps": -1, "num_train_epochs": 0.4}):
        again = made(tmp_path, options)
        result = again.train(resume_from_checkpoint=True)
        assert (result.global_step, again.state.global_step) == (2, 2)
        assert different(weights(again), weights(whole)) == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_differs_from_the_run_that_is_resumed_is_said(tmp_path: Path) -> None:
    def made_for(recipe: Recipe, steps: int) -> TernaryTrainer:
        return trainer(
            tmp_path,
            recipe,
            model=seeded(OneLayer),
            arguments_options={"max_steps": steps},
            callbacks=[SaveAt((3,))],
        )

    quarter = Recipe("quarter", schedule=(Phase("map", Intervene("map"), 0.25), Phase("quantise")))
    made_for(quarter, 8).train()
    options = quarter.to_dict()
    options["schedule"][0]["steps"] = 2
    for recipe, steps, message in (
        (
            Recipe.from_dict(options),
            8,
            r"of other options: schedule\[0\]\.steps was 0\.25 and is 2; resume with",
        ),
        (
            quarter,
            20,
            "for 8 steps in all, and this is for 20: step 3 was of phase 'quantise' and would be of 'map'",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            made_for(recipe, steps).train(resume_from_checkpoint=True)
