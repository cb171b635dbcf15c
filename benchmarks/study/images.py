"""Fashion-MNIST and a ViT for it."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from study.rows import Batch, Data, batches, fit
from ti_fx.errors import DataError

TRAIN, HELD_OUT = 20_000, 2_000


def make(folder: Path, layers: int, out: Path) -> None:
    """Train a ViT of so many layers and save it."""
    kind: Any = ViTConfig  # its fields of every model are untyped
    model = ViTForImageClassification(
        kind(
            hidden_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=512,
            image_size=28,
            patch_size=7,
            num_channels=1,
            num_labels=10,
        )
    )
    rows = read(folder, "train", 0, TRAIN)

    def draw(order: torch.Generator) -> Batch:
        return stack([rows[index] for index in torch.randint(len(rows), (64,), generator=order).tolist()])

    fit(model, draw, 600, 1e-3)
    model.save_pretrained(out)


def load(folder: Path) -> nn.Module:
    """Return the teacher."""
    model: nn.Module = ViTForImageClassification.from_pretrained(folder)
    return model


def data(images: Path, folder: Path) -> Data:
    """Return the rows; validation is of the training file, test of the other."""
    validation = read(images, "train", 50_000, HELD_OUT)
    test = read(images, "t10k", 0, HELD_OUT)
    return Data(
        read(images, "train", 0, TRAIN), stack, batches(validation, stack, 200), batches(test, stack, 200)
    )


def read(folder: Path, split: str, start: int, count: int) -> list[dict[str, Any]]:
    """Return images, float32 ``(1, 28, 28)`` in [-1, 1], and their labels.

    Raises:
        DataError: the folder lacks the files.
    """
    try:
        with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
            pixels = np.frombuffer(file.read()[16:], dtype=np.uint8).reshape(-1, 1, 28, 28)
        with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read()[8:], dtype=np.uint8)
    except OSError as error:
        raise DataError(
            f"can't read Fashion-MNIST in {folder} ({error}); it is Debian's package dataset-fashion-mnist: give the "
            "folder of its gzipped idx files as --images"
        ) from None
    chosen = slice(start, start + count)
    values = torch.from_numpy(pixels[chosen].astype(np.float32)) / 127.5 - 1
    return [
        {"pixel_values": one, "labels": int(label)} for one, label in zip(values, labels[chosen], strict=True)
    ]


def stack(rows: list[dict[str, Any]]) -> Batch:
    """Make a batch."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
