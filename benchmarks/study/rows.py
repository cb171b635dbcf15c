"""What every setting gives: rows to train on, batches to measure on, and how far a student is from its teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Data:
    """The rows of a setting.

    Attributes:
        train: rows as Trainer takes them. collate: makes a batch of rows.
        validation, test: batches; every choice is made on validation.
        shifted: whether a label is the next token.
    """

    train: Sequence[dict[str, Any]]
    collate: Callable[[list[dict[str, Any]]], Batch]
    validation: list[Batch]
    test: list[Batch]
    shifted: bool = False


@dataclass(frozen=True)
class Measured:
    """A student beside its teacher, on some batches.

    Attributes:
        kl: the divergence of its distribution from the teacher's, nats, a mean over rows (of a decoder, over tokens).
        loss: its cross-entropy with the labels, the same mean.
        accuracy: the share of right labels.
    """

    kl: float
    loss: float
    accuracy: float


class Yardstick:
    """Measures students against one teacher, whose logits are computed once."""

    def __init__(self, teacher: nn.Module, batches: list[Batch], shifted: bool) -> None:
        self.batches, self.shifted = batches, shifted
        teacher.eval()
        with torch.no_grad():
            self.expected = [_logits(teacher, batch).double().log_softmax(-1) for batch in batches]

    def measure(self, student: GraphModule | nn.Module) -> Measured:
        """Return how far a student, in eval mode, is from the teacher."""
        kl = loss = right = count = 0.0
        with torch.no_grad():
            for batch, known in zip(self.batches, self.expected, strict=True):
                found = _logits(student, batch).double().log_softmax(-1)
                labels = batch["labels"]
                if self.shifted:
                    known, found, labels = known[:, :-1], found[:, :-1], labels[:, 1:]
                known, found = known.flatten(0, -2), found.flatten(0, -2)
                labels = labels.flatten()
                kl += float((known.exp() * (known - found)).sum())
                loss += float(nn.functional.nll_loss(found, labels, reduction="sum"))
                right += float((found.argmax(-1) == labels).sum())
                count += len(labels)
        return Measured(kl / count, loss / count, right / count)


def _logits(module: nn.Module, batch: Batch) -> Tensor:
    result = module(**{name: value for name, value in batch.items() if name != "labels"})
    logits: Tensor = result["logits"]
    return logits


def batches(
    rows: Sequence[dict[str, Any]], collate: Callable[[list[dict[str, Any]]], Batch], size: int
) -> list[Batch]:
    """Return rows in batches, in their order."""
    return [
        collate([rows[index] for index in range(start, min(start + size, len(rows)))])
        for start in range(0, len(rows), size)
    ]


def fit(
    model: nn.Module,
    draw: Callable[[torch.Generator], Batch],
    steps: int,
    rate: float,
    say: Callable[[str], None] = print,
) -> None:
    """Train a teacher from random weights: AdamW, a tenth of the steps to warm up, then a straight line to zero."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    order = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min((step + 1) / (0.1 * steps), 1.0) * (1 - step / steps)
        loss = model(**draw(order)).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 100 == 0:
            say(f"  teacher: step {step + 1}/{steps}, loss {float(loss):.3f}")
    model.eval()
