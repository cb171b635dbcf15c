"""A setting is a teacher, its data and the length of a student's training; the study's are listed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from study import images, questions, text
from study.rows import Data

RATES = (2e-4, 5e-4, 1e-3, 2e-3)


@dataclass(frozen=True)
class Setting:
    """What is trained, on what, for how long.

    Attributes:
        name: as the command line and the results have it.
        what: a line for people.
        steps: optimiser steps of a student. batch_size: rows of one.
        make: trains the teacher and saves it into a folder.
        load: returns a new copy of the teacher from there.
        data: reads training, validation and test rows, from that folder's tokenizer where there is one.
        rates: the learning rates that every arm is tried at.
        seeds: how many runs an arm has at its best rate.
    """

    name: str
    what: str
    steps: int
    batch_size: int
    make: Callable[[Path], None]
    load: Callable[[Path], nn.Module]
    data: Callable[[Path], Data]
    rates: tuple[float, ...] = RATES
    seeds: int = 3

    def teacher(self, out: Path) -> Path:
        """Return the folder of the teacher, trained if it is not there yet."""
        folder = out / "teachers" / self.name
        if not (folder / "config.json").is_file():
            torch.manual_seed(0)
            self.make(folder)
        return folder


def all_settings(sources: dict[str, Any]) -> dict[str, Setting]:
    """Return the study's settings by name.

    Args:
        sources: ``images`` and ``text``: the folders of Fashion-MNIST and of WikiText-2.
    """
    made = []
    for layers in (4, 8, 12, 16, 24):
        made.append(
            Setting(
                f"vit-{layers}",
                f"a ViT of {layers} layers, 128 wide, on Fashion-MNIST",
                steps=120,
                batch_size=64,
                make=partial(images.make, sources["images"], layers),
                load=images.load,
                data=partial(images.data, sources["images"]),
            )
        )
    made.append(
        Setting(
            "decoder-24",
            "a Llama-like decoder of 24 layers, 128 wide, on WikiText-2",
            steps=120,
            batch_size=8,
            make=partial(text.make, sources["text"], 24),
            load=text.load,
            data=partial(text.data, sources["text"]),
        )
    )
    for name, what, rows in (
        ("minilm-50", "MiniLM on question types of 50 classes", None),
        ("minilm-300", "MiniLM on question types, 300 rows", 300),
        ("minilm-1000", "MiniLM on question types, 1,000 rows", 1000),
    ):
        made.append(
            Setting(
                name,
                what,
                steps=120,
                batch_size=32,
                make=partial(questions.make, rows, rows is None),
                load=questions.load,
                data=partial(questions.data, rows, rows is None),
                rates=(1e-4, 2e-4, 5e-4, 1e-3),
            )
        )
    return {one.name: one for one in made}
